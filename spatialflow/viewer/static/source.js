// SPDX-License-Identifier: Apache-2.0
// The data of the page: from the server, or from the elements of an exported page.
"use strict";

/** A map of segments: `ids` in ascending order, and for each pixel the position of its id in that list. */
class SlotMap {
  constructor(buffer) {
    const head = new DataView(buffer);
    this.width = head.getUint32(0, true);
    this.height = head.getUint32(4, true);
    const count = head.getUint32(8, true);
    this.ids = new Uint32Array(buffer, 12, count);
    this.slots = new Uint16Array(buffer, 12 + 4 * count, this.width * this.height);
  }

  /** Id of the segment at a pixel; 0 for void. */
  idAt(x, y) {
    return this.ids[this.slots[y * this.width + x]];
  }
}

async function decodeMap(blob) {
  // The server compresses the map itself, so that the page of a file and of a server decode the same bytes.
  const stream = blob.stream().pipeThrough(new DecompressionStream("deflate"));
  return new SlotMap(await new Response(stream).arrayBuffer());
}

async function bytesOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}

const serverSource = {
  version: "",

  async json(path) {
    const response = await fetch(path);
    if (!response.ok) throw new Error(await response.text());
    return response.json();
  },

  async index() {
    const index = await this.json("api/index.json");
    this.version = index.version;
    return index;
  },

  scores(from) {
    return this.json(`api/scores.json?from=${from}`);
  },

  classes() {
    return this.json("api/classes.json");
  },

  image(index) {
    return this.json(`api/image/${index}.json`);
  },

  thumb(index, key) {
    return `thumb/${key}/${index}.jpg?v=${this.version}`;
  },

  photo(index) {
    return `photo/${index}.jpg?v=${this.version}`;
  },

  async map(index, key) {
    const response = await fetch(`map/${key}/${index}.bin?v=${this.version}`);
    if (!response.ok) throw new Error(await response.text());
    return decodeMap(await response.blob());
  },
};

const embeddedSource = {
  cache: new Map(),

  read(name) {
    const element = document.getElementById(`data-${name}`);
    return element === null ? null : JSON.parse(element.textContent);
  },

  /** The data of an image; those of the images used last are kept. */
  entry(index) {
    if (!this.cache.has(index)) {
      if (this.cache.size >= 100) this.cache.delete(this.cache.keys().next().value);
      this.cache.set(index, this.read(`image-${index}`));
    }
    return this.cache.get(index);
  },

  async index() {
    return this.read("index");
  },

  async scores() {
    return this.read("scores");
  },

  async classes() {
    return this.read("classes");
  },

  async image(index) {
    return this.entry(index).payload;
  },

  thumb(index, key) {
    return jpegAddress(this.entry(index).thumbs[key]);
  },

  photo(index) {
    return jpegAddress(this.entry(index).photo);
  },

  async map(index, key) {
    const content = this.entry(index).maps[key];
    if (!content) throw new Error("the map cannot be shown");
    return decodeMap(await bytesOf(content, "application/octet-stream"));
  },
};

function jpegAddress(base64) {
  return base64 ? `data:image/jpeg;base64,${base64}` : "";
}

const source = document.getElementById("data-index") === null ? serverSource : embeddedSource;

/** Element with a class, a text and children. Texts never become HTML. */
function element(tag, className = "", text = null, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  made.append(...children);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

function percent(fraction, digits = 1) {
  return (100 * fraction).toFixed(digits);
}

/** Share of the pixels of an image, in percent. */
function share(pixels, total) {
  const part = (100 * pixels) / total;
  return part > 0 && part < 0.05 ? "< 0.1 %" : `${part.toFixed(1)} %`;
}

function signed(fraction) {
  const text = percent(Math.abs(fraction));
  return Number(text) === 0 ? "0.0" : (fraction < 0 ? "−" : "+") + text;
}

function whole(number) {
  return Math.round(number).toLocaleString("en-US");
}

function plural(count, name) {
  return `${whole(count)} ${name}${count === 1 ? "" : "s"}`;
}
