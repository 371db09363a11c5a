// SPDX-License-Identifier: Apache-2.0
// Start, addresses, keyboard, progress of the scores, and colors of the page.
"use strict";

const data = {
  index: null,
  categoryOf: new Map(), // by id
  pq: null, // PQ by image; NaN where there is none
  other: null, // PQ of the other predictions
  problems: null, // number of problems by image
  done: 0,
};

const POLL_MILLISECONDS = 1000;

async function start() {
  setUpPage();
  try {
    data.index = await source.index();
  } catch (error) {
    byId("loading").textContent = `The results cannot be read: ${error.message}`;
    byId("loading").classList.add("error");
    return;
  }
  const count = data.index.names.length;
  for (const category of data.index.categories) data.categoryOf.set(category.id, category);
  data.pq = new Float64Array(count).fill(NaN);
  data.other = new Float64Array(count).fill(NaN);
  data.problems = Uint32Array.from(data.index.problems);
  history.scrollRestoration = "manual";
  const omitted = data.index.total - count;
  if (omitted > 0) {
    const text = `This page has ${whole(count)} of ${plural(data.index.total, "image")}; the table of classes is of all.`;
    data.index.notes.push(text);
  }
  byId("warnings").hidden = data.index.warnings.length === 0;
  byId("warnings").replaceChildren(...data.index.warnings.map((text) => element("li", "", text)));
  showNotes(data.index.notes);
  grid.setUp();
  detail.setUp();
  classes.setUp();
  byId("loading").remove();
  addEventListener("hashchange", route);
  route();
  poll();
}

function showNotes(notes) {
  const box = byId("notes");
  box.hidden = notes.length === 0;
  box.open = notes.length === 1;
  box.querySelector("summary").textContent = plural(notes.length, "note");
  const shown = notes.slice(0, 100).map((text) => element("li", "", text));
  if (notes.length > 100) shown.push(element("li", "", `and ${whole(notes.length - 100)} more`));
  box.querySelector("ul").replaceChildren(...shown);
}

/** Show the view of the address: `#/`, `#/classes` or `#/image/7`. */
function route() {
  const image = location.hash.match(/^#\/image\/([0-9]+)$/);
  const isImage = image !== null && Number(image[1]) < data.index.names.length;
  const view = isImage ? "image" : location.hash === "#/classes" ? "classes" : "grid";
  const before = document.body.dataset.view;
  if (before === "grid") grid.scroll = scrollY;
  document.body.dataset.view = view;
  for (const name of ["grid", "image", "classes"]) byId(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const titles = data.index.sides.map((side) => side.title).join(" / ");
  document.title = `${isImage ? data.index.names[image[1]] : titles} – SpatialFlow`;
  byId("tooltip").hidden = true;
  if (view === "image") {
    scrollTo(0, 0);
    detail.open(Number(image[1]));
    if (before !== "image") byId("main").focus({ preventScroll: true });
  } else {
    detail.index = null;
    if (view === "classes") {
      scrollTo(0, 0);
      classes.update();
    } else {
      grid.layOut();
      scrollTo(0, grid.scroll ?? 0);
      grid.render();
      if (before === "image") grid.focus(grid.current);
    }
  }
}

/** Read the scores that were computed since the last time, until all are. */
async function poll() {
  let part;
  try {
    part = await source.scores(data.done);
  } catch {
    byId("progress").hidden = false;
    byId("progress-text").textContent = "the server has ended";
    byId("progress").classList.add("lost");
    return;
  }
  for (const [index, pq, other, problems] of part.rows) {
    data.pq[index] = pq ?? NaN;
    data.other[index] = other ?? NaN;
    data.problems[index] = problems;
  }
  const isDone = part.done >= part.total;
  const isNew = part.done > data.done;
  data.done = part.done;
  byId("progress").hidden = isDone;
  byId("progress-bar").style.width = `${(100 * part.done) / Math.max(part.total, 1)}%`;
  byId("progress-text").textContent = `${whole(part.done)} of ${whole(part.total)} read`;
  if (isNew) {
    showSummary();
    // Cards move only when all scores are known, or before the user has moved.
    if (document.body.dataset.view === "grid" && (isDone || scrollY === 0)) grid.update({ keepScroll: true });
    else grid.render();
    if (document.body.dataset.view === "classes") classes.update();
  }
  if (!isDone) setTimeout(poll, POLL_MILLISECONDS);
}

async function showSummary() {
  if (!data.index.scored.length) return;
  const totals = await source.classes().catch(() => null);
  if (totals === null) return;
  const parts = data.index.scored
    .filter((key) => totals[key].groups)
    .map((key) => {
      const name = data.index.scored.length > 1 ? `${detail.titleOf(key)} ` : "";
      return element("span", "", null, `${name}PQ `, element("strong", "", percent(totals[key].groups.All.pq)));
    });
  byId("summary").replaceChildren(...parts);
}

function setUpPage() {
  let theme = null;
  try {
    theme = localStorage.getItem("spatialflow-theme");
  } catch {
    // no storage, as in a page of a file in some browsers
  }
  const setTheme = (name) => {
    document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem("spatialflow-theme", name);
    } catch {
      // the choice holds for this page alone
    }
  };
  if (theme === "light" || theme === "dark") setTheme(theme);
  byId("theme").addEventListener("click", () => {
    const isDark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    setTheme(isDark ? "light" : "dark");
  });
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("main").focus();
  });
  addEventListener("keydown", handleKey);
}

function handleKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || data.index === null) return;
  const { target } = event;
  const isText = target.matches("input[type=search]");
  const takesArrows = target.matches("input[type=range], input[type=radio], select") && event.key.startsWith("Arrow");
  const view = document.body.dataset.view;
  let isDone = true;
  if (isText) {
    if (event.key === "Escape" && target.value) grid.reset();
    else if (event.key === "ArrowDown") grid.focus(grid.current);
    else isDone = false;
  } else if (takesArrows || (target.matches("select") && event.key.length === 1)) isDone = false;
  else if (event.key === "/") {
    if (view !== "grid") location.hash = "#/";
    setTimeout(() => byId("search").focus());
  } else if (event.key === "?") byId("help").showModal();
  else if (event.key === "c") location.hash = "#/classes";
  else if (event.key === "g") location.hash = "#/";
  else if (view === "image") isDone = detail.key(event);
  else if (view === "classes" && event.key === "Escape") location.hash = "#/";
  else if (view === "grid" && event.key === "Escape") grid.reset();
  else if (view === "grid" && event.key.startsWith("Arrow")) grid.focus(grid.current);
  else isDone = false;
  if (isDone) event.preventDefault();
}

start();
