// The live half of report.html: structures that turn (3Dmol.js), plots with hover, tables with filters.
// What models wrote reaches the page as text nodes alone; nothing here parses HTML, nothing is requested.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const PACE = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
const DASH = "\u2013";

/** An element ("svg:line" in SVG's namespace) with attributes, "on…" listeners, and children; strings are text. */
function make(name, attributes = {}, ...children) {
  const node = name.startsWith("svg:")
    ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const number = (value, digits = 2) => (value === null || value === undefined ? DASH
  : Math.abs(value) >= 1e5 || (digits > 3 && value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(1) : value.toFixed(digits)).replace("-", "\u2212");
const short = (value) => (value === null || value === undefined ? DASH : String(Number(value.toFixed(1))).replace("-", "\u2212"));
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);

// ---------------------------------------------------------------- a structure that turns

const CLOSER = 1.35; // than 3Dmol.js goes, which leaves room for every turn of a long molecule

/** Atoms as 3Dmol.js wants them: `repeat` cells along a and b, bonds by covalent radii. */
function atomsOf(structure, elements, repeat) {
  const cell = structure.l.map((x) => x / 1000), atoms = [], adsorbed = new Set(structure.a), symbols = [];
  for (let i = 0; i < structure.e.length; i += 2)
    for (let k = 0; k < structure.e[i + 1]; k++) symbols.push(structure.e[i]);
  for (let u = 0; u < repeat; u++) for (let v = 0; v < repeat; v++)
    symbols.forEach((elem, i) => {
      const [x, y, z] = [0, 1, 2].map((k) => structure.x[3 * i + k] / 100 + u * cell[k] + v * cell[3 + k]);
      atoms.push({ elem, x, y, z, bonds: [], bondOrder: [], properties: { adsorbed: adsorbed.has(i) } });
    });
  for (let i = 0; i < atoms.length; i++)
    for (let j = 0; j < i; j++) {
      const a = atoms[i], b = atoms[j], most = 1.2 * (elements[a.elem].r + elements[b.elem].r);
      const dx = a.x - b.x, dy = a.y - b.y, dz = a.z - b.z, square = dx * dx + dy * dy + dz * dz;
      if (square < most * most && square > 0.01) {
        a.bonds.push(j); a.bondOrder.push(1);
        b.bonds.push(i); b.bondOrder.push(1);
      }
    }
  return atoms;
}

/** The twelve edges of the cell as pairs of points. */
function edgesOf(structure) {
  const l = structure.l.map((x) => x / 1000), edges = [];
  const corner = (n) => {
    const [x, y, z] = [0, 1, 2].map((k) => (n & 1) * l[k] + ((n >> 1) & 1) * l[3 + k] + (n >> 2) * l[6 + k]);
    return { x, y, z };
  };
  for (let n = 0; n < 8; n++) for (const bit of [1, 2, 4])
    if (!(n & bit)) edges.push([corner(n), corner(n | bit)]);
  return edges;
}

let webgl;
/** Whether this browser can draw in 3D; 3Dmol.js fails in silence where it cannot. */
function drawsWebGL() {
  const canvas = document.createElement("canvas");
  return webgl ??= !!(canvas.getContext("webgl2") ?? canvas.getContext("webgl"));
}

/** A place where one structure is shown, with what is to say of it; made when it first comes into sight. */
function stage(records) {
  const canvas = make("div", { class: "canvas", tabindex: 0, role: "img" });
  const absent = make("div", { class: "absent" }, "Choose a row or a point.");
  const said = make("div", { class: "said" }), tools = make("div", { class: "tools" });
  const host = make("div", { class: "stage" }, canvas, tools, said);
  canvas.append(absent);
  let view = null, seen = false, item = null, repeat = 2, turned = false, spinning = false;

  /** From above (0) or lower down (degrees), turned about c first. */
  function look(angle, about = 0) {
    view.setView([0, 0, 0, 0, 0, 0, 0, 1]);
    view.rotate(-angle, "x");
    view.rotate(about, "z");
    view.zoomTo();
    view.zoom(CLOSER);
    view.render();
  }
  function draw() {
    const structure = item && records.structures[item.structure];
    absent.hidden = !!structure;
    absent.style.display = structure ? "none" : "";
    if (!structure || !seen) return;
    if (!drawsWebGL()) {
      absent.style.display = "";
      absent.textContent = "This browser shows no WebGL, which a structure in 3D needs.";
      return;
    }
    view ??= $3Dmol.createViewer(canvas, { backgroundAlpha: 0, disableFog: true });
    const cells = structure.x.length > 450 ? 1 : repeat, before = view.getView();
    view.removeAllModels();
    view.removeAllShapes();
    const model = view.addModel(), atoms = atomsOf(structure, records.elements, cells);
    model.addAtoms(atoms);
    for (const [elem, { c, r }] of Object.entries(records.elements)) {
      const style = (adsorbed) => model.setStyle({ elem, predicate: (a) => a.properties.adsorbed === adsorbed }, {
        sphere: { color: c, radius: adsorbed ? Math.max(0.36, 0.65 * r) : 0.7 * r },
        stick: { color: c, radius: adsorbed ? 0.18 : 0.07 } });
      style(false);
      style(true);
    }
    const ink = getComputedStyle(host).color;
    for (const [start, end] of edgesOf(structure)) view.addLine({ start, end, color: ink, linewidth: 1 });
    if (turned) {
      view.zoomTo();
      view.zoom(CLOSER);
      const now = view.getView();
      view.setView([...now.slice(0, 4), ...before.slice(4)]);
    } else {
      look(72, 20);
      turned = true;
    }
    view.render();
    canvas.dataset.shown = item.structure;
  }
  const press = (label, title, action) => make("button", { type: "button", title, onclick: action }, label);
  const cells = [1, 2, 3].map((n) => press(`${n} × ${n}`, "cells along a and b", () => { repeat = n; mark(); draw(); }));
  const spin = press("turn", "turn by itself", () => {
    spinning = !spinning;
    view?.spin(spinning ? "y" : false, 0.6);
    spin.setAttribute("aria-pressed", spinning);
  });
  const mark = () => cells.forEach((button, k) => button.setAttribute("aria-pressed", k + 1 === repeat));
  tools.append(press("side", "from the side", () => view && look(90)), press("top", "from above", () => view && look(0)),
    spin, make("span", { class: "gap" }), ...cells);
  mark();
  canvas.addEventListener("wheel", (event) => { if (!event.ctrlKey) event.stopPropagation(); }, { capture: true });
  canvas.addEventListener("keydown", (event) => {
    const turn = { ArrowLeft: [-10, "y"], ArrowRight: [10, "y"], ArrowUp: [-10, "x"], ArrowDown: [10, "x"] }[event.key];
    if (!turn || !view) return;
    event.preventDefault();
    view.rotate(...turn);
    view.render();
  });
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    seen = true;
    draw();
  }, { rootMargin: "300px" }).observe(canvas);
  new ResizeObserver(() => view?.resize()).observe(canvas);

  /** next: {structure, title, facts: [line…], text, absent}; brief: only passed over, its text is not set. */
  function show(next) {
    item = next;
    canvas.setAttribute("aria-label", `${item.title}, in 3D; drag or use the arrow keys to turn it`);
    absent.textContent = item.absent ?? "No structure of it is in this page.";
    const structure = records.structures[item.structure];
    const kinds = structure ? [...new Set(structure.e.filter((_, i) => i % 2 === 0))] : [];
    const legend = make("p", {}, ...kinds.flatMap((elem) => [
      make("span", { class: "dot", style: `background:${records.elements[elem].c}` }), elem]));
    said.replaceChildren(make("b", {}, item.title), ...item.facts.map((line) => make("p", {}, line)), legend);
    if (item.text) said.append(make("details", { open: item.open ? "" : null }, make("summary", {}, "Text of the answer"),
      make("pre", {}, item.text)));
    draw();
  }
  return { host, show };
}

// ---------------------------------------------------------------- plots

const tip = make("div", { class: "tip", role: "status" });
tip.hidden = true;

function tell(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = tip;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - w - 6))}px`;
  tip.style.top = `${y + 16 + h > innerHeight ? y - h - 12 : y + 16}px`;
}

function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((k) => k * power >= raw) * power, found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
}

/** A plot that fits its place. describe(): {x, y, title, ratio, xs, ys (ranges), lines, points, by}. A line
 *  is {points: [[x, y]…], colour, width, dash, pale}; a point {x, y, colour, pale, item, text}. `by`: "x" where
 *  the nearest point is looked for along x alone. over(point or null), pick(point): what the pointer is on. */
function plot(describe, { over, pick, label } = {}) {
  const host = make("div", { class: "plot" });
  let drawn = null, width = 0;
  function draw() {
    width = host.clientWidth;
    if (!width) return;
    const d = describe(), height = Math.round(Math.min(width * (d.ratio ?? 0.6), 540));
    const box = { left: 46, right: width - 10, top: d.title ? 24 : 10, bottom: height - (d.x ? 38 : 22) };
    let [x0, x1] = d.xs, [y0, y1] = d.ys;
    if (!(x1 > x0)) [x0, x1] = [x0 - 1, x0 + 1];
    if (!(y1 > y0)) [y0, y1] = [y0 - 0.5 * Math.abs(y0 || 1), y0 + 0.5 * Math.abs(y0 || 1)];
    const X = (x) => box.left + (x - x0) / (x1 - x0) * (box.right - box.left);
    const Y = (y) => box.bottom - (y - y0) / (y1 - y0) * (box.bottom - box.top);
    const root = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": d.label ?? label });
    const [xticks, xd] = ticks(x0, x1, Math.max(2, width / 90)), [yticks, yd] = ticks(y0, y1, Math.max(2, height / 50));
    for (const t of yticks) root.append(make("svg:line", { class: "grid", x1: box.left, x2: box.right, y1: Y(t), y2: Y(t) }),
      make("svg:text", { x: box.left - 6, y: Y(t) + 4, "text-anchor": "end" }, yd > 3 && t ? t.toExponential(0) : number(t, yd)));
    for (const t of xticks) root.append(make("svg:line", { class: "frame", x1: X(t), x2: X(t), y1: box.bottom, y2: box.bottom + 4 }),
      make("svg:text", { x: X(t), y: box.bottom + 16, "text-anchor": "middle" }, number(t, xd)));
    root.append(make("svg:line", { class: "frame", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    if (d.title) root.append(make("svg:text", { class: "title", x: 2, y: 13 }, d.title));
    if (d.x) root.append(make("svg:text", { x: (box.left + box.right) / 2, y: height - 5, "text-anchor": "middle" }, d.x));
    if (d.y) root.append(make("svg:text", { x: 11, y: (box.top + box.bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 11 ${(box.top + box.bottom) / 2})` }, d.y));
    for (const line of d.lines ?? []) {
      let path = "", pen = "M";
      for (const [x, y] of line.points) {
        if (y === null || y === undefined) { pen = "M"; continue; }
        path += `${pen}${X(x).toFixed(1)} ${Y(Math.min(Math.max(y, y0), y1)).toFixed(1)}`;
        pen = "L";
      }
      root.append(make("svg:path", { d: path, fill: "none", stroke: line.colour, "stroke-width": line.width ?? 1.5,
        "stroke-dasharray": line.dash ?? null, opacity: line.pale ?? null }));
    }
    const places = [];
    for (const point of d.points ?? []) {
      const at = { point, x: X(point.x), y: Y(Math.min(Math.max(point.y, y0), y1)) };
      if (point.colour) root.append(make("svg:circle", { cx: at.x.toFixed(1), cy: at.y.toFixed(1), r: point.size ?? 3.4,
        fill: point.colour, opacity: point.pale ?? 0.8 }));
      if (!point.still) places.push(at);
    }
    const mark = make("svg:circle", { class: "mark", r: 6, visibility: "hidden" });
    const pin = make("svg:circle", { class: "mark", r: 7, visibility: "hidden" });
    const pinned = d.pinned === undefined ? undefined : places.find((at) => at.point.item === d.pinned);
    if (pinned) for (const [k, v] of [["cx", pinned.x], ["cy", pinned.y], ["visibility", "visible"]]) pin.setAttribute(k, v);
    root.append(pin, mark);
    host.replaceChildren(root);
    drawn = { root, places, mark, by: d.by };
  }
  function nearest(event) {
    if (!drawn) return null;
    const frame = drawn.root.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
    let best = null, least = drawn.by === "x" ? Infinity : 26 ** 2;
    for (const at of drawn.places) {
      const off = (at.x - x) ** 2 + (drawn.by === "x" ? 1e-3 : 1) * (at.y - y) ** 2;
      if (off < least) [best, least] = [at, off];
    }
    return best;
  }
  function leave() {
    tip.hidden = true;
    drawn?.mark.setAttribute("visibility", "hidden");
    over?.(null);
  }
  host.addEventListener("pointermove", (event) => {
    const at = nearest(event);
    if (!at) { leave(); return; }
    for (const [k, v] of [["cx", at.x], ["cy", at.y], ["visibility", "visible"]]) drawn.mark.setAttribute(k, v);
    tell(at.point.text, event.clientX, event.clientY);
    over?.(at.point);
  });
  host.addEventListener("pointerleave", leave);
  host.addEventListener("click", (event) => {
    const at = nearest(event);
    if (at) pick?.(at.point);
  });
  new ResizeObserver(() => { if (host.clientWidth !== width) draw(); }).observe(host);
  return { host, draw };
}

function range(values, margin = 0.05) {
  const some = values.filter((v) => v !== null && Number.isFinite(v));
  const low = Math.min(...some), high = Math.max(...some);
  return some.length ? [low - margin * (high - low), high + margin * (high - low)] : [0, 1];
}

// ---------------------------------------------------------------- filters and tables

/** A select of [value, words] pairs; the first is what stands at the start. */
function choice(label, options, changed) {
  const select = make("select", { "aria-label": label, onchange: changed }, ...options.map(([value, words]) => make("option", { value }, words)));
  return { node: make("label", {}, label, select), get value() { return select.value; }, set value(v) { select.value = v; } };
}

/** Filters by adsorbate and metal of named systems. */
function byKind(systems, changed) {
  const sorted = (some) => [...new Set(some)].filter(Boolean).sort().map((name) => [name, name]);
  const adsorbate = choice("adsorbate", [["", "all"], ...sorted(systems.map((s) => s.adsorbate))], changed);
  const metal = choice("metal", [["", "all"], ...sorted(systems.flatMap((s) => s.metals))], changed);
  const fits = (s) => (!adsorbate.value || s.adsorbate === adsorbate.value) && (!metal.value || s.metals.includes(metal.value));
  return { nodes: [adsorbate.node, metal.node], fits };
}

/** A table in pages of 100. columns: {head, cell(row) -> text, key(row) to sort by, low(row), words}. */
function grid(columns, pick) {
  const body = make("tbody"), pages = make("div", { class: "pages" });
  let rows = [], from = 0, order = null, chosen = null;
  const heads = columns.map((column) => make("th", { scope: "col", class: column.words ? "words" : null }, make("button", {
    type: "button", onclick: () => {
      order = order?.column === column ? { column, down: !order.down } : { column, down: false };
      heads.forEach((th, k) => th.setAttribute("aria-sort",
        columns[k] !== column ? "none" : order.down ? "descending" : "ascending"));
      from = 0;
      draw();
    } }, column.head)));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  const host = make("div", {}, make("div", { class: "rows", tabindex: 0 }, table), pages);
  function draw() {
    let some = rows;
    if (order) {
      const { column, down } = order, value = (row) => column.key(row) ?? null;
      some = [...rows].sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === null || y === null) return (x === null) - (y === null);
        return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
      });
    }
    body.replaceChildren(...some.slice(from, from + 100).map((row) => {
      const choose = () => { select(row); pick(row); };
      return make("tr", { tabindex: 0, "aria-selected": row === chosen, onclick: choose,
        onkeydown: (event) => { if (event.key === "Enter") choose(); } },
      ...columns.map((c) => make("td", { class: [c.words && "words", c.low?.(row) && "low"].filter(Boolean).join(" ") || null },
        c.cell(row))));
    }));
    body.rows_ = some.slice(from, from + 100);
    const turn = (words, to, off) => make("button", { type: "button", disabled: off ? "" : null,
      onclick: () => { from = to; draw(); } }, words);
    pages.replaceChildren(...(some.length > 100 ? [turn("previous", from - 100, from === 0),
      `${from + 1} to ${Math.min(from + 100, some.length)} of ${some.length}`,
      turn("next", from + 100, from + 100 >= some.length)] : []));
  }
  function select(row) {
    chosen = row;
    [...body.rows].forEach((tr, k) => tr.setAttribute("aria-selected", body.rows_[k] === row));
  }
  return { host, select, set(some) { rows = some; from = 0; draw(); } };
}

/** Bring a stage into sight where a narrow page has it above what was pressed. */
function reveal(host) {
  const { top, bottom } = host.getBoundingClientRect();
  if (top < 0 || bottom > innerHeight) host.scrollIntoView({ block: "nearest", behavior: PACE });
}

// ---------------------------------------------------------------- the parts of the page

function parity(records) {
  const { systems, energy, colours, stages } = records.parity, shown = stage(records);
  const when = choice("after stage", stages.map((s, k) => [k, s.name]), () => update());
  when.value = stages.length - 1;
  const kind = byKind(systems, () => update());
  const count = make("span", { class: "count", "aria-live": "polite" }), worst = make("div", { class: "chips" });
  let pinned = null;
  const predicted = () => stages[when.value].predicted;
  const known = (i) => energy[i] !== null && predicted()[i] !== null;
  const fits = (i) => known(i) && kind.fits(systems[i]);
  const said = (i) => ({ structure: systems[i].structure, title: systems[i].name, facts: [
    `label ${number(energy[i])} eV, predicted ${number(predicted()[i])} eV`,
    `off by ${signed(predicted()[i] - energy[i])} eV`],
  absent: "The structures of the test systems were not at hand when this page was written." });
  const chart = plot(() => {
    const all = energy.keys(), some = [...all].filter(known), xs = range(some.flatMap((i) => [energy[i], predicted()[i]]));
    return { x: "label (eV)", y: "predicted (eV)", xs, ys: xs, ratio: 0.96, pinned,
      lines: [{ points: [[xs[0], xs[0]], [xs[1], xs[1]]], colour: "var(--soft)", width: 1 }],
      points: [...some.filter((i) => !fits(i)), ...some.filter(fits)].map((i) => ({ x: energy[i], y: predicted()[i], item: i,
        colour: fits(i) ? colours[systems[i].adsorbate] : "var(--soft)", pale: fits(i) ? 0.85 : 0.13, still: !fits(i),
        text: [systems[i].name, ...said(i).facts].join("\n") })) };
  }, { label: "parity plot of predicted against labelled energies",
    over: (point) => shown.show(said(point ? point.item : pinned)),
    pick: (point) => { pinned = point.item; shown.show(said(pinned)); chart.draw(); } });
  function update() {
    const some = [...energy.keys()].filter(fits), off = some.map((i) => predicted()[i] - energy[i]);
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    count.textContent = some.length ? `n ${some.length} · MAE ${number(mean(off.map(Math.abs)), 3)} eV · bias ${
      signed(mean(off), 3)} eV` : "no system fits";
    const far = some.map((i, k) => [Math.abs(off[k]), i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    worst.replaceChildren("Farthest off:", ...far.map(([, i]) => make("button", { type: "button", onclick: () => {
      pinned = i;
      shown.show(said(i));
      chart.draw();
    } }, `${systems[i].name} ${signed(predicted()[i] - energy[i])}`)));
    if (far.length && (pinned === null || !fits(pinned))) pinned = far[0][1];
    chart.draw();
    if (pinned !== null) shown.show(said(pinned));
  }
  const key = make("div", { class: "key" }, ...Object.entries(colours).map(([name, colour]) =>
    make("span", {}, make("span", { class: "dot", style: `background:${colour}` }), name)));
  return [make("div", { class: "filters" }, when.node, ...kind.nodes, count),
    make("div", { class: "side equal" }, make("div", {}, chart.host, key, worst), shown.host), update];
}

function tasks(records) {
  const { rows, judge, tolerance, colour } = records.tasks, shown = stage(records);
  const kind = byKind(rows, () => update());
  const outcomes = [...new Set(rows.map((row) => row.outcome))].sort();
  const outcome = choice("outcome", [["", "all"], ...outcomes.map((o) => [o, o])], () => update());
  const count = make("span", { class: "count", "aria-live": "polite" });
  const miss = (row) => (row.judged ?? row.predicted) === null || (row.judged ?? row.predicted) === undefined
    || row.outcome === "refused" ? null : Math.abs((row.judged ?? row.predicted) - row.energy);
  const energies = (row) => `wanted ${number(row.energy)} eV, predicted ${number(row.predicted)} eV`
    + (judge ? `, ${judge} ${number(row.judged)} eV` : "");
  const fits = (row) => kind.fits(row) && (!outcome.value || row.outcome === outcome.value);
  let chosen = [...rows].sort((a, b) => (miss(a) ?? Infinity) - (miss(b) ?? Infinity))[0];
  const chart = plot(() => {
    const some = rows.filter((row) => row.trace.length && fits(row));
    const last = Math.max(1, ...rows.map((row) => row.trace.length - 1));
    const best = (row) => row.trace.map(([off], k) => [k, off]);
    const top = Math.max(tolerance * 1.5, ...chosen.trace.flat().filter((v) => v !== null),
      ...some.flatMap((row) => row.trace.map(([off]) => off)));
    return { title: `Search for ${chosen.name}`, x: "iteration of the closed loop", y: "off the wanted energy (eV)",
      xs: [0, last], ys: [0, top * 1.04], ratio: 0.62, pinned: chosen,
      lines: [...some.map((row) => ({ points: best(row), colour: "var(--soft)", width: 1, pale: 0.28 })),
        { points: [[0, tolerance], [last, tolerance]], colour: "var(--ink)", width: 1, dash: "5 4" },
        { points: chosen.trace.map(([, mean], k) => [k, mean]), colour: "var(--accent)", dash: "2 3", width: 2 },
        { points: best(chosen), colour, width: 3 }],
      points: some.flatMap((row) => best(row).filter(([, off]) => off !== null).map(([x, y]) => ({ x, y, item: row,
        colour: row === chosen ? colour : null, text: `${row.name}, wanted ${number(row.energy)} eV\niteration ${x}: best ${
          number(y)} eV off` + (row.trace[x][1] === null ? "" : `, its candidates ${number(row.trace[x][1])} eV`) }))) };
  }, { label: "search traces of the tasks", pick: (point) => choose(point.item) });
  const list = grid([
    { head: "system", words: true, cell: (r) => r.name, key: (r) => r.name },
    { head: "wanted", cell: (r) => number(r.energy), key: (r) => r.energy },
    { head: "predicted", cell: (r) => number(r.predicted), key: (r) => r.predicted },
    ...(judge ? [{ head: judge, cell: (r) => number(r.judged), key: (r) => r.judged }] : []),
    { head: "off by", cell: (r) => number(miss(r)), key: miss },
    { head: "outcome", words: true, cell: (r) => r.outcome, key: (r) => r.outcome, low: (r) => r.outcome !== "hit" },
  ], (row) => choose(row, true));
  function choose(row, pressed = false) {
    chosen = row;
    list.select(row);
    shown.show({ structure: row.structure, title: row.name, facts: [energies(row), row.outcome + (row.why ? `: ${row.why}` : "")],
      text: row.text, absent: row.text ? "No cell of whole atoms can be read from this answer." : "No candidate could be read." });
    chart.draw();
    if (pressed) reveal(shown.host);
  }
  function update() {
    const some = rows.filter(fits);
    count.textContent = `${some.length} of ${rows.length} tasks`;
    list.set(some);
    if (some.length && !some.includes(chosen)) chosen = some[0];
    choose(chosen);
  }
  for (const card of document.querySelectorAll("[data-task]")) {
    const row = rows[Number(card.dataset.task)];
    const turn = () => { choose(row); shown.host.scrollIntoView({ block: "center", behavior: PACE }); };
    card.querySelector(".views")?.addEventListener("click", turn);
    card.append(make("button", { type: "button", onclick: turn }, "turn it in 3D"));
  }
  const key = make("div", { class: "key" }, ...[[colour, "best of the pool"], ["var(--accent)", "candidates of the iteration, mean"],
    ["var(--soft)", "other tasks"]].map(([paint, words]) => make("span", {}, make("span", { class: "dot", style: `background:${paint}` }),
    words)), `dashed: tolerance ${tolerance} eV`);
  return [make("div", { class: "filters" }, ...kind.nodes, outcome.node, count),
    make("div", { class: "side" }, make("div", {}, chart.host, key, list.host), shown.host), update];
}

function answers(records) {
  const { terms, systems } = records.answers, shown = stage(records);
  const first = 5 + terms.length;
  const rows = records.answers.rows.map((r) => ({ stage: r[0], free: r[1], system: systems[r[2]], energy: r[3], reward: r[4],
    terms: r.slice(5, first), reason: r[first], fault: r[first + 1], structure: r[first + 2], text: r[first + 3] }));
  const term = (row, name) => row.terms[terms.indexOf(name)];
  // by the names of the table of failures
  const checks = { PF: (r) => r.reason !== null, VF: (r) => r.reason === null && term(r, "valid") < 10,
    CM: (r) => r.reason === null && term(r, "comp") < 10, PV: (r) => r.reason === null && term(r, "phys") < 10,
    AD: (r) => r.fault !== null };
  const words = { PF: "unreadable", VF: "out of bounds", CM: "wrong atoms", PV: "too close or sparse", AD: "no real adsorbate" };
  for (const row of rows) row.fails = Object.keys(checks).filter((name) => checks[name](row));
  const wrong = (r) => r.fails.map((name) => ({ PF: `PF: ${r.reason}`, AD: `AD: ${r.fault}` }[name] ?? name)).join(", ");
  const kind = byKind(systems, () => update());
  const when = choice("after stage", [["", "all"], ...[...new Set(rows.map((r) => r.stage))].map((s) => [s, s])], () => update());
  const way = choice("decoding", [["", "all"], ["held", "held by the grammar"], ["free", "free"]], () => update());
  const fault = choice("fails", [["", "all"], ["none", "nothing"], ["any", "anything"],
    ...Object.entries(words).map(([name, says]) => [name, `${name}: ${says} (${rows.filter((r) => r.fails.includes(name)).length})`])],
  () => update());
  const search = make("input", { type: "search", size: 14, placeholder: "Pt9Au3 or loop", oninput: () => update() });
  const count = make("span", { class: "count", "aria-live": "polite" });
  const asked = (r) => (r.energy === null ? "a CIF" : `${number(r.energy)} eV`);
  const list = grid([
    { head: "system", words: true, cell: (r) => r.system.name, key: (r) => r.system.name },
    { head: "fails", words: true, cell: (r) => wrong(r) || DASH, key: wrong },
    { head: "after", words: true, cell: (r) => r.stage + (r.free ? ", free" : ""), key: (r) => r.stage + r.free },
    { head: "asked", cell: asked, key: (r) => r.energy },
    { head: "R", cell: (r) => number(r.reward), key: (r) => r.reward, low: (r) => r.reward < 10 },
    ...terms.map((name, k) => ({ head: name, cell: (r) => short(r.terms[k]), key: (r) => r.terms[k], low: (r) => r.terms[k] < 10 })),
  ], (row) => { show(row); reveal(shown.host); });
  const show = (r) => shown.show({ structure: r.structure, title: r.system.name, facts: [
    `after ${r.stage}${r.free ? ", free" : ""}; asked for ${r.energy === null ? "a CIF" : `a structure at ${number(r.energy)} eV`}`,
    `R ${number(r.reward)} · ${terms.map((name, k) => `${name} ${short(r.terms[k])}`).join(" · ")}`,
    ...(r.fails.length ? [`fails: ${wrong(r)}`] : [])], text: r.text, open: r.structure === null,
  absent: r.reason ? `Unreadable (${r.reason}): see its text.` : "No cell of whole atoms can be drawn from it." });
  let started = false;
  function update() {
    const sought = search.value.trim().toLowerCase();
    const some = rows.filter((r) => kind.fits(r.system) && (!when.value || r.stage === when.value)
      && (!way.value || r.free === (way.value === "free")) && (!fault.value || (fault.value === "none" ? !r.fails.length
        : fault.value === "any" ? r.fails.length : r.fails.includes(fault.value)))
      && (!sought || `${r.system.name} ${wrong(r)}`.toLowerCase().includes(sought)));
    count.textContent = `${some.length} of ${rows.length} answers`;
    list.set(some);
    if (started) return;
    started = true;
    const drawn = some.find((r) => r.structure !== null) ?? some[0];
    list.select(drawn);
    show(drawn);
  }
  return [make("div", { class: "filters" }, when.node, way.node, fault.node, ...kind.nodes, make("label", {}, "search", search), count),
    make("div", { class: "side" }, list.host, shown.host), update];
}

function training(records) {
  const panels = make("div", { class: "panels" }), chips = make("div", { class: "chips" });
  let plots = [];
  function curve(of, { title, steps, values }, name) {
    const window = Math.floor(values.length / 15), mean = [];
    if (window >= 3) {
      let sum = 0;
      values.forEach((v, i) => {
        sum += v - (i >= window ? values[i - window] : 0);
        if (i >= window - 1) mean.push([steps[i - (window >> 1)], sum / window]);
      });
    }
    const line = steps.map((s, i) => [s, values[i]]);
    return plot(() => ({ title: name ? `${of.name}: ${title}` : title, xs: [steps[0], steps[steps.length - 1]], ys: range(values),
      ratio: 0.62, by: "x", label: `${title} of ${of.name} over its steps`,
      lines: mean.length ? [{ points: line, colour: of.colour, width: 1, pale: 0.4 }, { points: mean, colour: of.colour, width: 2 }]
        : [{ points: line, colour: of.colour, width: 1.6 }],
      points: line.map(([x, y]) => ({ x, y, text: `${of.name}, step ${x}\n${title} ${number(y, 4)}` })) }));
  }
  function open(of) {
    const chosen = of ? of.curves.map((c) => [of, c, false])
      : records.training.flatMap((s) => s.curves.slice(0, 2).map((c) => [s, c, true]));
    plots = chosen.filter(([, c]) => c.steps.length).map((c) => curve(...c));
    panels.replaceChildren(...plots.map((p) => p.host));
    plots.forEach((p) => p.draw());
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", (k ? records.training[k - 1] : null) === of));
  }
  const buttons = [null, ...records.training].map((of) => make("button", { type: "button", onclick: () => open(of) },
    of ? of.name : "all stages"));
  chips.append(...buttons);
  return [chips, panels, () => open(null)];
}

// ---------------------------------------------------------------- begin

async function begin() {
  const packed = Uint8Array.from(atob(document.getElementById("records").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const records = JSON.parse(await new Response(stream).text());
  document.body.append(tip);
  for (const [name, build] of Object.entries({ parity, tasks, answers, training })) {
    const place = document.querySelector(`[data-live=${name}]`);
    if (!place || !records[name]) continue;
    const still = [...place.childNodes];
    try {
      const parts = build(records), start = parts.pop();
      place.replaceChildren(...parts);
      start();
    } catch (error) { // the picture that needs no script stays
      place.replaceChildren(...still);
      console.error(name, error);
    }
  }
  document.documentElement.dataset.live = "yes";
}

begin();
