// SPDX-License-Identifier: Apache-2.0
// Two layers over each other or side by side: photograph, colored segments, the segment that is pointed at.
"use strict";

const STATUS_COLORS = {
  fp: [213, 94, 0],
  fn: [0, 114, 178],
  wrong: [240, 200, 40],
  tp: [120, 160, 120],
};
const STATUS_NAMES = {
  fp: "false positive",
  fn: "missed",
  wrong: "wrong class",
  tp: "correct",
  crowd: "crowd, not scored",
  ignored: "not scored",
  none: "not scored",
};

/** Number that a pixel of canvas data has as 32 bits; canvas data are red, green, blue, alpha in memory. */
function pixelValue(red, green, blue, alpha = 255) {
  return new Uint32Array(new Uint8Array([red, green, blue, alpha]).buffer)[0];
}

class Layer {
  constructor(root) {
    this.root = root;
    this.content = root.querySelector(".content");
    this.photo = root.querySelector("img");
    [this.overlay, this.highlight] = root.querySelectorAll("canvas");
    this.tag = root.querySelector(".tag");
    this.clear();
  }

  clear() {
    this.side = null;
    this.map = null;
    this.segmentOf = new Map();
    for (const canvas of [this.overlay, this.highlight]) canvas.width = canvas.height = 1;
  }

  /** Show a side of an image. A `plain` layer shows the photograph alone; its map still names what is pointed at. */
  show({ title, address, side, map, segments, scoredBy, plain, missed }) {
    this.clear();
    this.tag.textContent = title;
    if (address) {
      if (this.photo.getAttribute("src") !== address) this.photo.src = address;
      this.photo.hidden = false;
    } else {
      this.photo.removeAttribute("src");
      this.photo.hidden = true;
    }
    this.side = side;
    this.map = map;
    this.scoredBy = scoredBy;
    this.plain = plain;
    this.missed = missed;
    this.segmentOf = new Map((segments ?? []).map((segment) => [segment.id, segment]));
  }

  statusOf(segment) {
    return segment.status?.[this.scoredBy];
  }

  /** Draw the colored segments. */
  draw({ things, stuff, errors }) {
    if (this.map === null || this.plain) {
      this.overlay.width = this.overlay.height = 1;
      return;
    }
    const { width, height, ids, slots } = this.map;
    const fill = new Uint32Array(ids.length);
    const line = new Uint32Array(ids.length);
    ids.forEach((id, slot) => {
      const segment = this.segmentOf.get(id);
      if (segment === undefined) return;
      const isThing = isThingOf(segment);
      if (isThing ? !things : !stuff) return;
      const status = this.statusOf(segment);
      let color = segment.color;
      let alpha = 255;
      if (errors) {
        color = STATUS_COLORS[status] ?? [128, 128, 128];
        alpha = status === "tp" || !(status in STATUS_COLORS) ? 60 : 255;
      }
      fill[slot] = pixelValue(...color, alpha);
      line[slot] = pixelValue(...color.map((part) => Math.round(0.45 * part + 0.55 * 255)), errors ? alpha : 255);
    });
    this.overlay.width = width;
    this.overlay.height = height;
    const context = this.overlay.getContext("2d");
    const picture = context.createImageData(width, height);
    const pixels = new Uint32Array(picture.data.buffer);
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        const slot = slots[i];
        const border =
          (x + 1 < width && slots[i + 1] !== slot) || (y + 1 < height && slots[i + width] !== slot) || (x > 0 && slots[i - 1] !== slot);
        pixels[i] = border ? line[slot] : fill[slot];
      }
    }
    if (errors) this.drawMissed(pixels, fill);
    context.putImageData(picture, 0, 0);
  }

  /** Color segments of the ground truth that the side misses, except where the side has an error of its own. */
  drawMissed(pixels, fill) {
    const { width, height, slots, ids } = this.map;
    if (!this.missed || this.missed.map.width !== width || this.missed.map.height !== height) return;
    const isError = Array.from(ids, (id) => ["fp", "wrong"].includes(this.statusOf(this.segmentOf.get(id) ?? {})));
    const isMissed = Array.from(this.missed.map.ids, (id) => this.missed.ids.has(id));
    const color = pixelValue(...STATUS_COLORS.fn);
    const truth = this.missed.map.slots;
    for (let i = 0; i < pixels.length; i++) {
      if (isMissed[truth[i]] && !(isError[slots[i]] && fill[slots[i]])) pixels[i] = color;
    }
  }

  /** Mark one segment by its id; null for none. */
  mark(id) {
    if (this.marked === id && this.highlight.width > 1 === (id !== null)) return;
    this.marked = id;
    const slot = id === null || this.map === null ? -1 : this.map.ids.indexOf(id);
    if (slot < 0) {
      this.highlight.width = this.highlight.height = 1;
      return;
    }
    const { width, height, slots } = this.map;
    this.highlight.width = width;
    this.highlight.height = height;
    const context = this.highlight.getContext("2d");
    const picture = context.createImageData(width, height);
    const pixels = new Uint32Array(picture.data.buffer);
    const inner = pixelValue(255, 255, 255, 90);
    const outer = pixelValue(255, 255, 255, 255);
    const reach = Math.max(1, Math.round(Math.max(width, height) / 500));
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        if (slots[i] !== slot) continue;
        const border =
          x < reach || y < reach || x >= width - reach || y >= height - reach ||
          slots[i - reach] !== slot || slots[i + reach] !== slot ||
          slots[i - reach * width] !== slot || slots[i + reach * width] !== slot;
        pixels[i] = border ? outer : inner;
      }
    }
    context.putImageData(picture, 0, 0);
  }

  /** Segment below a point of the window; null for void, or outside. */
  segmentAt(clientX, clientY) {
    if (this.map === null) return null;
    const box = this.content.getBoundingClientRect();
    const x = Math.floor(((clientX - box.left) / box.width) * this.map.width);
    const y = Math.floor(((clientY - box.top) / box.height) * this.map.height);
    if (x < 0 || y < 0 || x >= this.map.width || y >= this.map.height) return null;
    return this.segmentOf.get(this.map.idAt(x, y)) ?? null;
  }
}

function isThingOf(segment) {
  return segment.category === null || Boolean(data.categoryOf.get(segment.category)?.thing);
}

function categoryName(id) {
  return id === null ? "not in the JSON" : (data.categoryOf.get(id)?.name ?? String(id));
}
