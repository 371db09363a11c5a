// SPDX-License-Identifier: Apache-2.0
// The view of one image: two layers with a slider, toggles, zoom, and the list of segments.
"use strict";

const MODES = ["wipe", "fade", "side"];
const MAX_ZOOM = 16;

const detail = {
  index: null,
  mode: "wipe",
  zoom: { scale: 1, x: 0, y: 0 }, // x and y in fractions of the stage
  maps: new Map(),
  pinned: null,

  setUp() {
    [this.a, this.b] = [...document.querySelectorAll(".layer")].map((root) => new Layer(root));
    this.stage = byId("stage");
    const { index } = data;
    const options = [["photo", "Photograph"], ...index.sides.map((side) => [side.key, side.title])];
    for (const id of ["layer-a", "layer-b"]) {
      byId(id).append(...options.map(([key, title]) => new Option(title, key)));
      byId(id).addEventListener("change", () => this.showLayers());
    }
    const keys = index.sides.map((side) => side.key);
    const compared = keys.includes("other");
    byId("layer-a").value = compared ? "prediction" : keys.includes("truth") && keys.length > 1 ? "truth" : "photo";
    byId("layer-b").value = compared ? "other" : index.main;
    this.setMode(compared ? "side" : "wipe");
    byId("errors-label").hidden = index.scored.length === 0;

    for (const input of document.querySelectorAll("input[name=mode]")) {
      input.addEventListener("change", () => this.setMode(input.value));
    }
    for (const id of ["show-things", "show-stuff", "show-errors"]) {
      byId(id).addEventListener("change", () => this.draw());
    }
    byId("opacity").addEventListener("input", () => this.setOpacity());
    byId("position").addEventListener("input", () => this.setPosition());
    byId("previous").addEventListener("click", () => this.step(-1));
    byId("next").addEventListener("click", () => this.step(1));
    byId("zoom-in").addEventListener("click", () => this.zoomBy(1.5));
    byId("zoom-out").addEventListener("click", () => this.zoomBy(1 / 1.5));
    byId("zoom-fit").addEventListener("click", () => this.resetZoom());
    this.setUpPointer();
    this.setOpacity();
    this.setPosition();
  },

  setUpPointer() {
    let drag = null;
    this.stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.target.closest(".zoom")) return;
      const wipes = event.target.closest("#divider") !== null || (this.mode === "wipe" && this.zoom.scale === 1);
      drag = { wipes, x: event.clientX, y: event.clientY, moved: false };
      this.stage.setPointerCapture(event.pointerId);
      this.point(event);
    });
    this.stage.addEventListener("pointermove", (event) => {
      if (drag !== null) {
        const box = this.stage.getBoundingClientRect();
        drag.moved ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 3;
        if (drag.moved && drag.wipes) {
          byId("position").value = (100 * (event.clientX - box.left)) / box.width;
          this.setPosition();
        } else if (drag.moved && this.zoom.scale > 1) {
          const frame = this.a.root.getBoundingClientRect();
          this.zoom.x += event.movementX / frame.width;
          this.zoom.y += event.movementY / frame.height;
          this.applyZoom();
        }
      }
      this.point(event);
    });
    this.stage.addEventListener("pointerup", (event) => {
      if (drag !== null && !drag.moved) this.pin(this.segmentBelow(event)?.segment ?? null);
      drag = null;
    });
    this.stage.addEventListener("pointercancel", () => (drag = null));
    this.stage.addEventListener("pointerleave", () => this.hover(null));
    this.stage.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && this.zoom.scale === 1) return; // the page scrolls; a pinch counts as Ctrl
        event.preventDefault();
        this.zoomBy(Math.exp(-event.deltaY / 300), event);
      },
      { passive: false },
    );
  },

  async open(index) {
    this.index = index;
    this.resetZoom();
    this.pin(null);
    byId("image-name").textContent = data.index.names[index];
    byId("image-facts").replaceChildren();
    byId("image-problems").hidden = true;
    const position = grid.order.indexOf(index);
    if (position >= 0) grid.current = position;
    byId("image-position").textContent = position < 0 ? "" : `${whole(position + 1)} / ${whole(grid.order.length)}`;
    byId("previous").disabled = position <= 0;
    byId("next").disabled = position < 0 || position === grid.order.length - 1;
    this.stage.classList.add("busy");
    let payload;
    const failures = [];
    const maps = new Map();
    try {
      payload = await source.image(index);
      await Promise.all(
        Object.keys(payload.sides).map(async (key) => {
          try {
            maps.set(key, await source.map(index, key));
          } catch (error) {
            failures.push(error.message);
          }
        }),
      );
    } catch (error) {
      payload = { name: data.index.names[index], sides: {}, photo: false, pq: {}, problems: [] };
      failures.push(`the image cannot be shown: ${error.message}`);
    }
    if (this.index !== index) return; // another image was opened meanwhile
    this.payload = payload;
    this.maps = maps;
    this.stage.classList.remove("busy");
    this.showFacts();
    this.showProblems([...new Set([...payload.problems, ...failures])]);
    const [width, height] = payload.shown ?? [3, 2];
    this.stage.style.setProperty("--ratio", width / height);
    this.showLayers();
    this.preload(position);
  },

  preload(position) {
    const next = position < 0 ? undefined : grid.order[position + 1];
    if (next !== undefined && source === serverSource) new Image().src = source.photo(next);
  },

  showFacts() {
    const { payload } = this;
    const facts = [];
    for (const side of data.index.sides) {
      const pq = payload.pq[side.key];
      if (typeof pq === "number") {
        const made = badge(pq);
        made.title = side.title;
        facts.push(element("span", "fact", null, ...(data.index.scored.length > 1 ? [`${side.title} `] : []), made));
      }
    }
    if (typeof payload.pq.prediction === "number" && typeof payload.pq.other === "number") {
      const difference = payload.pq.prediction - payload.pq.other;
      facts.push(element("span", `delta ${difference < 0 ? "worse" : "better"}`, signed(difference)));
    }
    if (payload.width) facts.push(element("span", "fact dim", `${payload.width} × ${payload.height}`));
    byId("image-facts").replaceChildren(...facts);
  },

  showProblems(problems) {
    const shown = problems.slice(0, 20).map((text) => element("li", "", text));
    if (problems.length > 20) shown.push(element("li", "", `and ${problems.length - 20} more`));
    byId("image-problems").replaceChildren(...shown);
    byId("image-problems").hidden = problems.length === 0;
  },

  titleOf(key) {
    return key === "photo" ? "Photograph" : data.index.sides.find((side) => side.key === key).title;
  },

  /** Side by which a layer of the ground truth is scored: that of the other layer, if it is a scored one. */
  scoredBy(key, otherKey) {
    if (key !== "truth") return key;
    return data.index.scored.includes(otherKey) ? otherKey : "prediction";
  },

  showLayers() {
    if (this.payload === undefined) return;
    const { payload, maps } = this;
    const chosen = [byId("layer-a").value, byId("layer-b").value];
    [this.a, this.b].forEach((layer, i) => {
      const side = chosen[i] === "photo" ? this.mainSide() : chosen[i];
      layer.show({
        title: this.titleOf(chosen[i]),
        address: payload.photo ? source.photo(this.index) : "",
        side,
        map: maps.get(side) ?? null,
        segments: payload.sides[side]?.segments,
        scoredBy: this.scoredBy(side, chosen[1 - i]),
        plain: chosen[i] === "photo",
        missed: this.missedSegments(side),
      });
      layer.root.classList.toggle("absent", chosen[i] !== "photo" && !maps.has(side));
    });
    this.draw();
    this.listSegments();
  },

  /** Map and ids of the segments of the ground truth that a scored side misses; null for another side. */
  missedSegments(side) {
    const map = this.maps.get("truth");
    if (!data.index.scored.includes(side) || map === undefined) return null;
    const missed = this.payload.sides.truth.segments.filter((segment) => segment.status?.[side] === "fn");
    return { map, ids: new Set(missed.map((segment) => segment.id)) };
  },

  /** Side that names the segments of the photograph: that of the other layer, or the main one. */
  mainSide() {
    const chosen = [byId("layer-b").value, byId("layer-a").value].find((key) => key !== "photo");
    return chosen ?? data.index.main;
  },

  draw() {
    const errors = byId("show-errors").checked;
    const options = { things: byId("show-things").checked, stuff: byId("show-stuff").checked, errors };
    this.a.draw(options);
    this.b.draw(options);
    byId("legend").hidden = !errors;
    this.stage.classList.toggle("errors", errors);
    this.setOpacity();
  },

  setOpacity() {
    for (const layer of [this.a, this.b]) layer.overlay.style.opacity = byId("opacity").value / 100;
  },

  setMode(mode) {
    this.mode = mode;
    for (const input of document.querySelectorAll("input[name=mode]")) input.checked = input.value === mode;
    this.stage.dataset.mode = mode;
    byId("position-label").hidden = mode === "side";
    byId("divider").hidden = mode !== "wipe";
    this.setPosition();
  },

  setPosition() {
    const value = byId("position").value;
    this.stage.style.setProperty("--position", `${value}%`);
    this.b.root.style.clipPath = this.mode === "wipe" ? `inset(0 0 0 ${value}%)` : "";
    this.b.root.style.opacity = this.mode === "fade" ? value / 100 : "";
    this.a.tag.style.opacity = this.mode === "fade" ? 1 - value / 100 : "";
  },

  zoomBy(factor, event = null) {
    const frame = this.a.root.getBoundingClientRect();
    const over = event === null ? null : this.layerBelow(event)?.root.getBoundingClientRect();
    const centerX = over ? (event.clientX - over.left) / frame.width : 0.5;
    const centerY = over ? (event.clientY - over.top) / frame.height : 0.5;
    const scale = Math.min(Math.max(this.zoom.scale * factor, 1), MAX_ZOOM);
    const ratio = scale / this.zoom.scale;
    this.zoom = {
      scale,
      x: centerX - ratio * (centerX - this.zoom.x),
      y: centerY - ratio * (centerY - this.zoom.y),
    };
    this.applyZoom();
  },

  resetZoom() {
    this.zoom = { scale: 1, x: 0, y: 0 };
    this.applyZoom();
  },

  applyZoom() {
    const { zoom } = this;
    for (const axis of ["x", "y"]) zoom[axis] = Math.min(0, Math.max(1 - zoom.scale, zoom[axis]));
    for (const layer of [this.a, this.b]) {
      layer.content.style.transform = `translate(${100 * zoom.x}%, ${100 * zoom.y}%) scale(${zoom.scale})`;
    }
    this.stage.classList.toggle("zoomed", zoom.scale > 1);
  },

  layerBelow(event) {
    const box = this.b.root.getBoundingClientRect();
    const isInside =
      event.clientX >= box.left && event.clientX < box.right && event.clientY >= box.top && event.clientY < box.bottom;
    const position = byId("position").value / 100;
    if (this.mode === "side") return isInside ? this.b : this.a;
    if (this.mode === "wipe") return (event.clientX - box.left) / box.width >= position ? this.b : this.a;
    return position >= 0.5 ? this.b : this.a;
  },

  segmentBelow(event) {
    const layer = this.layerBelow(event);
    const segment = layer.segmentAt(event.clientX, event.clientY);
    return segment === null ? null : { layer, segment };
  },

  /** Name the segment below the pointer. */
  point(event) {
    const found = this.segmentBelow(event);
    this.hover(found);
    const tooltip = byId("tooltip");
    if (found === null) return;
    const margin = 14;
    const x = Math.min(event.clientX + margin, document.documentElement.clientWidth - tooltip.offsetWidth - 4);
    const below = event.clientY + margin + tooltip.offsetHeight < innerHeight;
    const y = below ? event.clientY + margin : event.clientY - margin - tooltip.offsetHeight;
    tooltip.style.transform = `translate(${Math.max(4, x)}px, ${Math.max(4, y)}px)`;
  },

  hover(found) {
    const tooltip = byId("tooltip");
    tooltip.hidden = found === null;
    if (found !== null) {
      const key = `${found.layer.side} ${found.segment.id}`;
      if (tooltip.dataset.key !== key) {
        tooltip.dataset.key = key;
        tooltip.replaceChildren(...this.describe(found.segment, found.layer));
      }
    }
    this.mark(found?.segment ?? this.pinned?.segment ?? null, found?.layer.side ?? this.pinned?.side);
  },

  /** Mark a segment on the layers of its side, and in the list. */
  mark(segment, side) {
    for (const layer of [this.a, this.b]) layer.mark(segment !== null && layer.side === side ? segment.id : null);
    for (const button of byId("segments").querySelectorAll("button")) {
      const isMarked = segment !== null && side === this.listedSide && Number(button.dataset.id) === segment.id;
      button.classList.toggle("marked", isMarked);
    }
  },

  /** Keep a segment marked, after a click. */
  pin(segment) {
    const side = segment === null ? null : [this.b, this.a].find((layer) => layer.segmentOf.get(segment.id) === segment)?.side;
    this.pinned = segment === null || this.pinned?.segment === segment ? null : { segment, side };
    for (const button of byId("segments").querySelectorAll("button")) {
      const isPinned = this.pinned !== null && side === this.listedSide && Number(button.dataset.id) === segment.id;
      button.setAttribute("aria-pressed", isPinned);
      if (isPinned) button.scrollIntoView({ block: "nearest" });
    }
    this.mark(this.pinned?.segment ?? null, this.pinned?.side);
  },

  describe(segment, layer) {
    const total = this.payload.width * this.payload.height;
    const swatch = element("span", "swatch");
    swatch.style.background = `rgb(${segment.color.join(" ")})`;
    const rows = [element("strong", "", null, swatch, categoryName(segment.category))];
    const facts = [`${whole(segment.area)} px`, share(segment.area, total)];
    if (segment.score !== undefined) facts.unshift(`score ${Number(segment.score).toFixed(2)}`);
    rows.push(element("span", "", facts.join(" · ")));
    const status = this.statusText(segment, layer);
    if (status) rows.push(element("span", "", status));
    rows.push(element("span", "dim", `${this.titleOf(layer.side)}, segment ${segment.id}`));
    return rows;
  },

  statusText(segment, layer) {
    const status = layer.statusOf(segment);
    if (status === undefined) return "";
    let text = STATUS_NAMES[status];
    if (status === "tp") text += `, IoU ${percent(segment.iou[layer.scoredBy])} %`;
    if (status === "wrong") {
      const other = categoryName(segment.instead[layer.scoredBy]);
      text += layer.side === "truth" ? `: predicted as ${other}` : `: is ${other}`;
    }
    return text;
  },

  listSegments() {
    const layer = [this.b, this.a].find((each) => !each.plain) ?? this.b;
    this.listedSide = layer.side;
    const segments = [...(this.payload.sides[layer.side]?.segments ?? [])].sort((a, b) => b.area - a.area);
    byId("segments-title").textContent = `${this.titleOf(layer.side)}: ${plural(segments.length, "segment")}`;
    const total = this.payload.width * this.payload.height;
    const rows = segments.map((segment) => {
      const swatch = element("span", "swatch");
      swatch.style.background = `rgb(${segment.color.join(" ")})`;
      const button = element("button", "segment", null, swatch, element("span", "name", categoryName(segment.category)));
      const status = layer.statusOf(segment);
      if (status in STATUS_COLORS && status !== "tp") button.append(element("span", `status ${status}`, STATUS_NAMES[status]));
      if (segment.score !== undefined) button.append(element("span", "number", Number(segment.score).toFixed(2)));
      button.append(element("span", "number area", share(segment.area, total)));
      button.type = "button";
      button.dataset.id = segment.id;
      button.setAttribute("aria-pressed", "false");
      button.title = [categoryName(segment.category), `${whole(segment.area)} px`, this.statusText(segment, layer)]
        .filter(Boolean)
        .join(", ");
      button.addEventListener("click", () => this.pin(segment));
      button.addEventListener("pointerenter", () => this.mark(segment, layer.side));
      button.addEventListener("pointerleave", () => this.hover(null));
      button.addEventListener("focus", () => this.mark(segment, layer.side));
      button.addEventListener("blur", () => this.hover(null));
      return element("li", "", null, button);
    });
    byId("segments").replaceChildren(...rows);
  },

  step(direction) {
    const position = grid.order.indexOf(this.index);
    const next = position < 0 ? undefined : grid.order[position + direction];
    if (next !== undefined) location.replace(`#/image/${next}`);
  },

  key(event) {
    const toggles = { t: "show-things", s: "show-stuff", e: "show-errors" };
    if (event.key in toggles) {
      const box = byId(toggles[event.key]);
      if (box.closest("label").hidden) return false;
      box.checked = !box.checked;
      this.draw();
    } else if (["1", "2", "3"].includes(event.key)) this.setMode(MODES[event.key - 1]);
    else if (event.key === "ArrowLeft") this.step(-1);
    else if (event.key === "ArrowRight") this.step(1);
    else if (event.key === "[" || event.key === "]") {
      byId("position").value = Number(byId("position").value) + (event.key === "[" ? -5 : 5);
      this.setPosition();
    } else if (event.key === "x") {
      const [first, second] = [byId("layer-a"), byId("layer-b")];
      [first.value, second.value] = [second.value, first.value];
      this.showLayers();
    } else if (event.key === "+" || event.key === "=") this.zoomBy(1.5);
    else if (event.key === "-") this.zoomBy(1 / 1.5);
    else if (event.key === "0") this.resetZoom();
    else if (event.key === "Escape") location.hash = "#/";
    else return false;
    return true;
  },
};
