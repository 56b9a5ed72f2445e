// A structure that turns: atoms, bonds and the cell of a packed system, drawn by 3Dmol.js.
"use strict";

const CLOSER = 1.35; // than 3Dmol.js goes, which leaves room for every turn of a long molecule

/** Atoms as 3Dmol.js wants them: `repeat` cells along a and b, bonds by covalent radii. */
function atomsOf(structure, elements, repeat) {
    const cell = structure.l.map((x) => x / 1000),
        atoms = [],
        adsorbed = new Set(structure.a),
        symbols = [];
    for (let i = 0; i < structure.e.length; i += 2)
        for (let k = 0; k < structure.e[i + 1]; k++) symbols.push(structure.e[i]);
    for (let u = 0; u < repeat; u++)
        for (let v = 0; v < repeat; v++)
            symbols.forEach((elem, i) => {
                const [x, y, z] = [0, 1, 2].map(
                    (k) => structure.x[3 * i + k] / 100 + u * cell[k] + v * cell[3 + k],
                );
                atoms.push({
                    elem,
                    x,
                    y,
                    z,
                    bonds: [],
                    bondOrder: [],
                    properties: { adsorbed: adsorbed.has(i) },
                });
            });
    for (let i = 0; i < atoms.length; i++)
        for (let j = 0; j < i; j++) {
            const a = atoms[i],
                b = atoms[j],
                most = 1.2 * (elements[a.elem].r + elements[b.elem].r);
            const dx = a.x - b.x,
                dy = a.y - b.y,
                dz = a.z - b.z,
                square = dx * dx + dy * dy + dz * dz;
            if (square < most * most && square > 0.01) {
                a.bonds.push(j);
                a.bondOrder.push(1);
                b.bonds.push(i);
                b.bondOrder.push(1);
            }
        }
    return atoms;
}

/** The twelve edges of the cell as pairs of points. */
function edgesOf(structure) {
    const l = structure.l.map((x) => x / 1000),
        edges = [];
    const corner = (n) => {
        const [x, y, z] = [0, 1, 2].map(
            (k) => (n & 1) * l[k] + ((n >> 1) & 1) * l[3 + k] + (n >> 2) * l[6 + k],
        );
        return { x, y, z };
    };
    for (let n = 0; n < 8; n++)
        for (const bit of [1, 2, 4]) if (!(n & bit)) edges.push([corner(n), corner(n | bit)]);
    return edges;
}

let webgl;
/** Whether this browser can draw in 3D; 3Dmol.js fails in silence where it cannot. */
function drawsWebGL() {
    const canvas = document.createElement("canvas");
    return (webgl ??= !!(canvas.getContext("webgl2") ?? canvas.getContext("webgl")));
}

/** A place where one structure is shown, with what is to say of it; made when it first comes into sight. */
function stage(records) {
    const canvas = make("div", { class: "canvas", tabindex: 0, role: "img" });
    const absent = make("div", { class: "absent" }, "Choose a row or a point.");
    const said = make("div", { class: "said" }),
        tools = make("div", { class: "tools" });
    const host = make("div", { class: "stage" }, canvas, tools, said);
    canvas.append(absent);
    let view = null,
        seen = false,
        item = null,
        repeat = 2,
        turned = false,
        spinning = false;

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
        absent.style.display = structure ? "none" : "";
        if (!structure || !seen) return;
        if (!drawsWebGL()) {
            absent.style.display = "";
            absent.textContent = "This browser shows no WebGL, which a structure in 3D needs.";
            return;
        }
        view ??= $3Dmol.createViewer(canvas, { backgroundAlpha: 0, disableFog: true });
        const cells = structure.x.length > 450 ? 1 : repeat,
            before = view.getView();
        view.removeAllModels();
        view.removeAllShapes();
        const model = view.addModel(),
            atoms = atomsOf(structure, records.elements, cells);
        model.addAtoms(atoms);
        for (const [elem, { c, r }] of Object.entries(records.elements)) {
            const style = (adsorbed) =>
                model.setStyle(
                    { elem, predicate: (a) => a.properties.adsorbed === adsorbed },
                    {
                        sphere: { color: c, radius: adsorbed ? Math.max(0.36, 0.65 * r) : 0.7 * r },
                        stick: { color: c, radius: adsorbed ? 0.18 : 0.07 },
                    },
                );
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
    const cells = [1, 2, 3].map((n) =>
        press(`${n} × ${n}`, "cells along a and b", () => {
            repeat = n;
            mark();
            draw();
        }),
    );
    const spin = press("turn", "turn by itself", () => {
        spinning = !spinning;
        view?.spin(spinning ? "y" : false, 0.6);
        spin.setAttribute("aria-pressed", spinning);
    });
    const mark = () => cells.forEach((button, k) => button.setAttribute("aria-pressed", k + 1 === repeat));
    tools.append(
        press("side", "from the side", () => view && look(90)),
        press("top", "from above", () => view && look(0)),
        spin,
        make("span", { class: "gap" }),
        ...cells,
    );
    mark();
    canvas.addEventListener(
        "wheel",
        (event) => {
            if (!event.ctrlKey) event.stopPropagation();
        },
        { capture: true },
    );
    canvas.addEventListener("keydown", (event) => {
        const turn = {
            ArrowLeft: [-10, "y"],
            ArrowRight: [10, "y"],
            ArrowUp: [-10, "x"],
            ArrowDown: [10, "x"],
        }[event.key];
        if (!turn || !view) return;
        event.preventDefault();
        view.rotate(...turn);
        view.render();
    });
    new IntersectionObserver(
        (entries, observer) => {
            if (!entries.some((entry) => entry.isIntersecting)) return;
            observer.disconnect();
            seen = true;
            draw();
        },
        { rootMargin: "300px" },
    ).observe(canvas);
    new ResizeObserver(() => view?.resize()).observe(canvas);

    /** next: {structure, title, facts: [line…], text, open (its text), absent: why none is drawn}. */
    function show(next) {
        item = next;
        canvas.setAttribute("aria-label", `${item.title}, in 3D; drag or use the arrow keys to turn it`);
        absent.textContent = item.absent ?? "No structure of it is in this page.";
        const structure = records.structures[item.structure];
        const kinds = structure ? [...new Set(structure.e.filter((_, i) => i % 2 === 0))] : [];
        const legend = make(
            "p",
            {},
            ...kinds.flatMap((elem) => [
                make("span", { class: "dot", style: `background:${records.elements[elem].c}` }),
                elem,
            ]),
        );
        said.replaceChildren(
            make("b", {}, item.title),
            ...item.facts.map((line) => make("p", {}, line)),
            legend,
        );
        if (item.text)
            said.append(
                make(
                    "details",
                    { open: item.open ? "" : null },
                    make("summary", {}, "Text of the answer"),
                    make("pre", {}, item.text),
                ),
            );
        draw();
    }
    return { host, show };
}
