// SPDX-License-Identifier: Apache-2.0
// The grid of images: search, filters, order, and cards for the part of the grid that is visible.
"use strict";

const CARD = { minimum: 210, gap: 12, text: 58 };
const OVERSCAN = 2;

const SORTS = {
  name: { title: "Name", compare: (a, b) => collator.compare(data.index.names[a], data.index.names[b]) },
  worst: { title: "PQ, worst first", scored: true, value: (i) => data.pq[i], ascending: true },
  best: { title: "PQ, best first", scored: true, value: (i) => data.pq[i] },
  lost: { title: "PQ lost to compared", compared: true, value: (i) => data.pq[i] - data.other[i], ascending: true },
  gained: { title: "PQ gained on compared", compared: true, value: (i) => data.pq[i] - data.other[i] },
  low: { title: "Score, lowest first", score: true, value: (i) => data.index.scores[i] ?? NaN, ascending: true },
  high: { title: "Score, highest first", score: true, value: (i) => data.index.scores[i] ?? NaN },
  many: { title: "Most segments", value: (i) => data.index.segments[i] },
  few: { title: "Fewest segments", value: (i) => data.index.segments[i], ascending: true },
};
const collator = new Intl.Collator(undefined, { numeric: true });

const grid = {
  order: [],
  current: 0, // position in `order` of the card that the Tab key reaches
  cards: new Map(), // index of the image -> card
  columns: 1,
  rowHeight: 1,

  setUp() {
    this.list = byId("grid");
    const { index } = data;
    const scored = index.scored.includes("prediction");
    const compared = index.scored.length === 2;
    for (const [name, sort] of Object.entries(SORTS)) {
      if (sort.scored && !scored) continue;
      if (sort.compared && !compared) continue;
      if (sort.score && !index.scores.some((score) => score !== null)) continue;
      byId("sort").append(new Option(sort.title, name));
    }
    const classes = index.categories.map((category, i) => [category.name, i]);
    classes.sort((a, b) => collator.compare(a[0], b[0]));
    byId("class-filter").append(new Option("All", ""), ...classes.map(([name, i]) => new Option(name, i)));
    byId("truth-label").hidden = !scored || index.truth.every(Boolean);
    const kinds = index.sides.map((side) => new Option(side.title, side.key));
    byId("thumb-kind").append(new Option("Photograph", "photo"), ...kinds);
    byId("thumb-kind").value = index.main;

    for (const id of ["class-filter", "sort", "only-problems", "only-truth"]) {
      byId(id).addEventListener("change", () => this.update());
    }
    byId("search").addEventListener("input", () => this.update());
    byId("thumb-kind").addEventListener("change", () => this.redraw());
    byId("filters").addEventListener("submit", (event) => {
      event.preventDefault();
      this.focus(0);
    });
    byId("reset").addEventListener("click", () => this.reset());
    addEventListener("scroll", () => this.render(), { passive: true });
    new ResizeObserver(() => this.layOut()).observe(this.list);
    this.list.addEventListener("keydown", (event) => this.move(event));
    this.update();
  },

  reset() {
    byId("search").value = "";
    byId("class-filter").value = "";
    byId("only-problems").checked = byId("only-truth").checked = false;
    this.update();
    byId("search").focus();
  },

  /** Compute which images are shown, and in which order. */
  update({ keepScroll = false } = {}) {
    const { index } = data;
    const query = byId("search").value.trim().toLowerCase();
    const category = byId("class-filter").value;
    const problems = byId("only-problems").checked;
    const truth = byId("only-truth").checked;
    const chosen = [];
    for (let i = 0; i < index.names.length; i++) {
      if (query && !index.names[i].toLowerCase().includes(query)) continue;
      if (category !== "" && !index.classes[i].includes(Number(category))) continue;
      if (problems && !data.problems[i]) continue;
      if (truth && !index.truth[i]) continue;
      chosen.push(i);
    }
    const sort = SORTS[byId("sort").value];
    if (sort.compare) chosen.sort(sort.compare);
    else {
      const sign = sort.ascending ? 1 : -1;
      const rank = (i) => {
        const value = sort.value(i);
        return Number.isNaN(value) ? Infinity : sign * value; // images without a value come last
      };
      const ranks = new Map(chosen.map((i) => [i, rank(i)]));
      chosen.sort((a, b) => (ranks.get(a) === ranks.get(b) ? a - b : ranks.get(a) < ranks.get(b) ? -1 : 1));
    }
    const focused = keepScroll ? this.order[this.current] : undefined;
    this.order = chosen;
    this.current = Math.max(0, focused === undefined ? 0 : chosen.indexOf(focused));
    const total = index.names.length;
    byId("count").textContent =
      chosen.length === total ? plural(total, "image") : `${whole(chosen.length)} of ${plural(total, "image")}`;
    byId("empty").hidden = chosen.length > 0;
    if (!keepScroll && scrollY > this.list.offsetTop) scrollTo(0, 0);
    this.layOut();
  },

  redraw() {
    this.cards.clear();
    this.list.replaceChildren();
    this.render();
  },

  layOut() {
    const width = this.list.clientWidth;
    if (!width) return; // another view is shown
    this.columns = Math.max(width < 480 ? 2 : 1, Math.floor((width + CARD.gap) / (CARD.minimum + CARD.gap)));
    const cardWidth = (width - CARD.gap * (this.columns - 1)) / this.columns;
    this.cardWidth = cardWidth;
    this.rowHeight = Math.round(cardWidth * (2 / 3)) + CARD.text + CARD.gap;
    this.list.style.height = `${Math.ceil(this.order.length / this.columns) * this.rowHeight}px`;
    this.render();
  },

  /** Keep exactly the cards of the visible rows, and a few beyond them, in the page. */
  render() {
    if (!this.list.clientWidth) return;
    const top = this.list.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / this.rowHeight) - OVERSCAN);
    const last = Math.ceil((innerHeight - top) / this.rowHeight) + OVERSCAN;
    const wanted = new Map();
    const end = Math.min(this.order.length, last * this.columns);
    for (let position = first * this.columns; position < end; position++) wanted.set(this.order[position], position);
    if (this.order.length) wanted.set(this.order[this.current], this.current);
    for (const [index, card] of this.cards) {
      if (!wanted.has(index)) {
        card.remove();
        this.cards.delete(index);
      }
    }
    // The elements have the order of the page, as screen readers read them in it. Moving an element takes its focus.
    const active = this.list.contains(document.activeElement) ? document.activeElement : null;
    let place = this.list.firstElementChild;
    for (const [index, position] of [...wanted].sort((a, b) => a[1] - b[1])) {
      let card = this.cards.get(index);
      if (card === undefined) {
        card = this.makeCard(index);
        this.cards.set(index, card);
      }
      if (card === place) place = card.nextElementSibling;
      else this.list.insertBefore(card, place);
      this.place(card, index, position);
    }
    if (active !== null && active.isConnected) active.focus({ preventScroll: true });
  },

  place(card, index, position) {
    const column = position % this.columns;
    const row = Math.floor(position / this.columns);
    card.style.width = `${this.cardWidth}px`;
    card.style.height = `${this.rowHeight - CARD.gap}px`;
    card.style.transform = `translate(${column * (this.cardWidth + CARD.gap)}px, ${row * this.rowHeight}px)`;
    card.setAttribute("aria-posinset", position + 1);
    card.setAttribute("aria-setsize", this.order.length);
    const link = card.firstElementChild;
    link.tabIndex = position === this.current ? 0 : -1;
    this.fill(link, index);
  },

  makeCard(index) {
    const name = data.index.names[index];
    const picture = element("span", "picture");
    const image = element("img");
    image.alt = "";
    image.decoding = "async";
    image.addEventListener("error", () => picture.replaceChildren(element("span", "missing", "no picture")));
    const address = source.thumb(index, byId("thumb-kind").value);
    if (address) {
      image.src = address;
      picture.append(image);
    } else picture.append(element("span", "missing", "no picture"));
    const start = name.lastIndexOf("/") + 1; // a long folder is cut, so that the file name can be read
    const parts = [element("span", "folder", name.slice(0, start)), element("span", "file", name.slice(start))];
    const link = element("a", "card", null, picture, element("span", "name", null, ...parts), element("span", "values"));
    link.href = `#/image/${index}`;
    link.title = name;
    link.draggable = false;
    link.addEventListener("focus", () => {
      const position = this.order.indexOf(index);
      if (position >= 0) this.current = position;
    });
    return element("li", "", null, link);
  },

  /** Show the values of an image that are known so far. */
  fill(link, index) {
    const values = [];
    const pq = data.pq[index];
    if (!Number.isNaN(pq)) {
      values.push(badge(pq));
      const difference = pq - data.other[index];
      if (!Number.isNaN(difference)) {
        values.push(element("span", `delta ${difference < 0 ? "worse" : "better"}`, signed(difference)));
      }
    } else if (data.index.scores[index] !== null) {
      values.push(element("span", "score", `score ${data.index.scores[index].toFixed(2)}`));
    }
    values.push(element("span", "count", plural(data.index.segments[index], "segment")));
    if (data.problems[index]) {
      const sign = element("span", "sign", "⚠");
      sign.title = plural(data.problems[index], "problem");
      values.push(sign);
    }
    const text = values.map((value) => value.textContent).join(" · ");
    if (link.dataset.values !== text) {
      link.dataset.values = text;
      link.lastElementChild.replaceChildren(...values);
    }
  },

  move(event) {
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this.columns,
      ArrowDown: this.columns,
      PageUp: -this.columns * 3,
      PageDown: this.columns * 3,
      Home: -Infinity,
      End: Infinity,
    };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const target = this.current + steps[event.key];
    if (Math.abs(steps[event.key]) === this.columns && (target < 0 || target >= this.order.length)) return;
    this.focus(Math.min(Math.max(target, 0), this.order.length - 1));
  },

  /** Scroll to a position of the order and focus its card. */
  focus(position) {
    if (!this.order.length) return;
    this.current = Math.min(position, this.order.length - 1);
    const top = this.list.getBoundingClientRect().top + scrollY + Math.floor(this.current / this.columns) * this.rowHeight;
    const header = document.querySelector(".top").offsetHeight + CARD.gap;
    if (top < scrollY + header) scrollTo(0, top - header);
    else if (top + this.rowHeight > scrollY + innerHeight) scrollTo(0, top + this.rowHeight - innerHeight);
    this.render();
    this.cards.get(this.order[this.current]).firstElementChild.focus({ preventScroll: true });
  },
};

/** PQ with a bar of its length. */
function badge(pq) {
  const made = element("span", "badge", `PQ ${percent(pq)}`);
  made.style.setProperty("--part", pq);
  return made;
}
