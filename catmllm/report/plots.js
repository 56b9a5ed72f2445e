// Plots that fit their place and tell what is pointed at.
"use strict";

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
    const raw = (high - low) / most,
        power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((k) => k * power >= raw) * power,
        found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
    return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
}

/** A plot that fits its place. describe(): {x, y, title, ratio, xs, ys (ranges), lines, points, by}. A line
 *  is {points: [[x, y]…], colour, width, dash, pale}; a point {x, y, colour, pale, item, text}. `by`: "x"
 *  where the nearest point is looked for along x alone. over(point or null), pick(point): what the pointer is
 *  on. */
function plot(describe, { over, pick, label } = {}) {
    const host = make("div", { class: "plot" });
    let drawn = null,
        width = 0;
    function draw() {
        width = host.clientWidth;
        if (!width) return;
        const d = describe(),
            height = Math.round(Math.min(width * (d.ratio ?? 0.6), 540));
        const box = { left: 46, right: width - 10, top: d.title ? 24 : 10, bottom: height - (d.x ? 38 : 22) };
        let [x0, x1] = d.xs,
            [y0, y1] = d.ys;
        if (!(x1 > x0)) [x0, x1] = [x0 - 1, x0 + 1];
        if (!(y1 > y0)) [y0, y1] = [y0 - 0.5 * Math.abs(y0 || 1), y0 + 0.5 * Math.abs(y0 || 1)];
        const X = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
        const Y = (y) => box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top);
        const root = make("svg:svg", {
            viewBox: `0 0 ${width} ${height}`,
            height,
            role: "img",
            "aria-label": d.label ?? label,
        });
        const [xticks, xd] = ticks(x0, x1, Math.max(2, width / 90)),
            [yticks, yd] = ticks(y0, y1, Math.max(2, height / 50));
        for (const t of yticks)
            root.append(
                make("svg:line", { class: "grid", x1: box.left, x2: box.right, y1: Y(t), y2: Y(t) }),
                make(
                    "svg:text",
                    { x: box.left - 6, y: Y(t) + 4, "text-anchor": "end" },
                    yd > 3 && t ? t.toExponential(0) : number(t, yd),
                ),
            );
        for (const t of xticks)
            root.append(
                make("svg:line", { class: "frame", x1: X(t), x2: X(t), y1: box.bottom, y2: box.bottom + 4 }),
                make("svg:text", { x: X(t), y: box.bottom + 16, "text-anchor": "middle" }, number(t, xd)),
            );
        root.append(
            make("svg:line", { class: "frame", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
        );
        if (d.title) root.append(make("svg:text", { class: "title", x: 2, y: 13 }, d.title));
        if (d.x)
            root.append(
                make(
                    "svg:text",
                    { x: (box.left + box.right) / 2, y: height - 5, "text-anchor": "middle" },
                    d.x,
                ),
            );
        if (d.y)
            root.append(
                make(
                    "svg:text",
                    {
                        x: 11,
                        y: (box.top + box.bottom) / 2,
                        "text-anchor": "middle",
                        transform: `rotate(-90 11 ${(box.top + box.bottom) / 2})`,
                    },
                    d.y,
                ),
            );
        for (const line of d.lines ?? []) {
            let path = "",
                pen = "M";
            for (const [x, y] of line.points) {
                if (y === null || y === undefined) {
                    pen = "M";
                    continue;
                }
                path += `${pen}${X(x).toFixed(1)} ${Y(Math.min(Math.max(y, y0), y1)).toFixed(1)}`;
                pen = "L";
            }
            root.append(
                make("svg:path", {
                    d: path,
                    fill: "none",
                    stroke: line.colour,
                    "stroke-width": line.width ?? 1.5,
                    "stroke-dasharray": line.dash ?? null,
                    opacity: line.pale ?? null,
                }),
            );
        }
        const places = [];
        for (const point of d.points ?? []) {
            const at = { point, x: X(point.x), y: Y(Math.min(Math.max(point.y, y0), y1)) };
            if (point.colour)
                root.append(
                    make("svg:circle", {
                        cx: at.x.toFixed(1),
                        cy: at.y.toFixed(1),
                        r: point.size ?? 3.4,
                        fill: point.colour,
                        opacity: point.pale ?? 0.8,
                    }),
                );
            if (!point.still) places.push(at);
        }
        const mark = make("svg:circle", { class: "mark", r: 6, visibility: "hidden" });
        const pin = make("svg:circle", { class: "mark", r: 7, visibility: "hidden" });
        const pinned = d.pinned === undefined ? undefined : places.find((at) => at.point.item === d.pinned);
        if (pinned)
            for (const [k, v] of [
                ["cx", pinned.x],
                ["cy", pinned.y],
                ["visibility", "visible"],
            ])
                pin.setAttribute(k, v);
        root.append(pin, mark);
        host.replaceChildren(root);
        drawn = { root, places, mark, by: d.by };
    }
    function nearest(event) {
        if (!drawn) return null;
        const frame = drawn.root.getBoundingClientRect(),
            x = event.clientX - frame.left,
            y = event.clientY - frame.top;
        let best = null,
            least = drawn.by === "x" ? Infinity : 26 ** 2;
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
        if (!at) {
            leave();
            return;
        }
        for (const [k, v] of [
            ["cx", at.x],
            ["cy", at.y],
            ["visibility", "visible"],
        ])
            drawn.mark.setAttribute(k, v);
        tell(at.point.text, event.clientX, event.clientY);
        over?.(at.point);
    });
    host.addEventListener("pointerleave", leave);
    host.addEventListener("click", (event) => {
        const at = nearest(event);
        if (at) pick?.(at.point);
    });
    new ResizeObserver(() => {
        if (host.clientWidth !== width) draw();
    }).observe(host);
    return { host, draw };
}

function range(values, margin = 0.05) {
    const some = values.filter((v) => v !== null && Number.isFinite(v));
    const low = Math.min(...some),
        high = Math.max(...some);
    return some.length ? [low - margin * (high - low), high + margin * (high - low)] : [0, 1];
}
