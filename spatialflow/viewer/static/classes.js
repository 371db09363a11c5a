// SPDX-License-Identifier: Apache-2.0
// The table of classes: quality where there is a ground truth, numbers and areas of segments elsewhere.
"use strict";

const classes = {
  sort: null,
  descending: false,

  setUp() {
    const { index } = data;
    byId("class-side").append(...index.sides.map((side) => new Option(side.title, side.key)));
    byId("class-side").value = index.main;
    byId("class-side").closest(".toolbar").hidden = index.sides.length === 1;
    byId("class-side").addEventListener("change", () => {
      this.sort = null;
      this.show();
    });
  },

  async update() {
    try {
      this.totals = await source.classes();
    } catch {
      return; // the message about the lost server is shown by the progress
    }
    this.show();
  },

  columns(key) {
    const rows = this.totals[key].rows;
    const name = {
      title: "Class",
      text: (row) => categoryName(row.id),
      value: (row) => categoryName(row.id).toLowerCase(),
      isName: true,
    };
    const number = (title, field, label) => ({ title, label, value: (row) => row[field], text: (row) => whole(row[field]) });
    const quality = (title, field, label) => ({
      title,
      label,
      value: (row) => (row.n ? row[field] : -1),
      text: (row) => (row.n ? percent(row[field]) : "–"),
    });
    if (!data.index.scored.includes(key)) {
      const total = rows.reduce((sum, row) => sum + row.pixels, 0) || 1;
      return [
        name,
        number("Segments", "segments", "Number of segments"),
        number("Images", "images", "Images with the class"),
        {
          title: "Area %",
          label: "Share of the pixels of all segments",
          value: (row) => row.pixels,
          text: (row) => percent(row.pixels / total, 2),
        },
        { title: "Sizes", label: "Segments by area", histogram: "areas" },
      ];
    }
    const list = [
      name,
      quality("PQ", "pq", "Panoptic quality"),
      quality("SQ", "sq", "Segmentation quality: mean IoU of matches"),
      quality("RQ", "rq", "Recognition quality: F1 of matches"),
      number("TP", "tp", "Matches"),
      number("FP", "fp", "False positives"),
      number("FN", "fn", "Missed segments"),
      { title: "PQ per image", label: "Images by PQ of the class", histogram: "qualities" },
    ];
    const other = data.index.scored.find((each) => each !== key);
    if (other !== undefined) {
      const rowOf = new Map(this.totals[other].rows.map((row) => [row.id, row]));
      const difference = (row) => (row.n && rowOf.get(row.id)?.n ? row.pq - rowOf.get(row.id).pq : NaN);
      list.splice(2, 0, {
        title: "Δ PQ",
        label: `Difference from ${detail.titleOf(other)}`,
        value: (row) => (Number.isNaN(difference(row)) ? -2 : difference(row)),
        text: (row) => (Number.isNaN(difference(row)) ? "–" : signed(difference(row))),
        className: (row) => (difference(row) < 0 ? "worse" : difference(row) > 0 ? "better" : ""),
      });
    }
    return list;
  },

  show() {
    const key = byId("class-side").value;
    const columns = this.columns(key);
    const rows = [...this.totals[key].rows];
    if (this.sort !== null) {
      const { value } = columns[this.sort];
      const sign = this.descending ? -1 : 1;
      rows.sort((a, b) => sign * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
    }
    byId("class-table").tHead.replaceChildren(element("tr", "", null, ...columns.map((column, i) => this.head(column, i))));
    byId("class-table").tBodies[0].replaceChildren(...rows.map((row) => this.row(row, columns)));
    this.showGroups(key);
    byId("class-note").textContent = rows.length ? "A class opens the images that have it." : "No segment is read yet.";
  },

  head(column, i) {
    const cell = element("th", column.isName ? "name" : "");
    cell.scope = "col";
    if (column.histogram) {
      cell.textContent = column.title;
      cell.title = column.label;
      return cell;
    }
    const isSorted = this.sort === i;
    const button = element("button", "", column.title + (isSorted ? (this.descending ? " ↓" : " ↑") : ""));
    button.type = "button";
    if (column.label) button.title = column.label;
    button.addEventListener("click", () => {
      this.descending = isSorted ? !this.descending : !column.isName;
      this.sort = i;
      this.show();
      byId("class-table").tHead.querySelectorAll("th")[i].querySelector("button").focus();
    });
    if (isSorted) cell.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
    cell.append(button);
    return cell;
  },

  row(row, columns) {
    const category = data.categoryOf.get(row.id);
    const cells = columns.map((column) => {
      if (column.histogram) return element("td", "", null, histogram(row[column.histogram], column.histogram));
      if (!column.isName) return element("td", `number ${column.className?.(row) ?? ""}`, column.text(row));
      const swatch = element("span", "swatch");
      swatch.style.background = `rgb(${category.color.join(" ")})`;
      const link = element("a", "", column.text(row));
      link.href = "#/";
      link.addEventListener("click", () => {
        byId("class-filter").value = data.index.categories.indexOf(category);
        grid.update();
      });
      const cell = element("th", "name", null, swatch, link, element("span", "kind", category.thing ? "thing" : "stuff"));
      cell.scope = "row";
      return cell;
    });
    return element("tr", "", null, ...cells);
  },

  showGroups(key) {
    const { groups } = this.totals[key];
    const cards = Object.entries(groups ?? {}).map(([name, row]) =>
      element(
        "div",
        "group",
        null,
        element("span", "dim", name),
        element("strong", "", row.n ? percent(row.pq) : "–"),
        element("span", "dim", `PQ · SQ ${percent(row.sq)} · RQ ${percent(row.rq)} · ${row.n} class${row.n === 1 ? "" : "es"}`),
      ),
    );
    byId("groups").replaceChildren(...cards);
  },
};

/** Bars of the numbers of a histogram, with their meaning as a title. */
function histogram(counts, kind) {
  const space = "http://www.w3.org/2000/svg";
  const make = (tag, attributes) => {
    const made = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const width = 10;
  const height = 24;
  const largest = Math.max(...counts, 1);
  const picture = make("svg", { viewBox: `0 0 ${width * counts.length} ${height}`, class: "histogram", role: "img" });
  const text = counts.map((count, i) => `${binName(i, kind)}: ${whole(count)}`).join("\n");
  picture.setAttribute("aria-label", text.replaceAll("\n", ", "));
  counts.forEach((count, i) => {
    const part = count === 0 ? 0 : Math.max(2, Math.round((count / largest) * height));
    const bar = make("rect", { x: i * width, y: height - part, width: width - 2, height: part });
    picture.append(bar);
  });
  picture.append(make("line", { x1: 0, y1: height - 0.5, x2: width * counts.length, y2: height - 0.5 }));
  const title = make("title", {});
  title.textContent = text;
  picture.append(title);
  return picture;
}

function binName(i, kind) {
  const { count, smallest_share: smallest } = data.index.bins;
  if (kind === "qualities") return `PQ ${(100 * i) / count}–${(100 * (i + 1)) / count}`;
  const bound = (j) => `${Number((100 * smallest * 10 ** (j / 2)).toPrecision(2))} %`;
  if (i === 0) return `up to ${bound(0)} of the image`;
  return i === count - 1 ? `above ${bound(i - 1)}` : `${bound(i - 1)} to ${bound(i)}`;
}
