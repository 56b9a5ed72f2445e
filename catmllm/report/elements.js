// How the scripts of report.html make elements and write numbers. What models wrote reaches the page as text
// nodes alone; nothing here parses HTML, and nothing is requested.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const PACE = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
const DASH = "\u2013";

/** An element ("svg:line": of SVG) with attributes, "on…" listeners, and children; strings are text. */
function make(name, attributes = {}, ...children) {
    const node = name.startsWith("svg:")
        ? document.createElementNS(SVG, name.slice(4))
        : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
        if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
        else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
}

const number = (value, digits = 2) =>
    (value === null || value === undefined
        ? DASH
        : Math.abs(value) >= 1e5 || (digits > 3 && value !== 0 && Math.abs(value) < 1e-3)
          ? value.toExponential(1)
          : value.toFixed(digits)
    ).replace("-", "\u2212");
const short = (value) =>
    value === null || value === undefined ? DASH : String(Number(value.toFixed(1))).replace("-", "\u2212");
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
