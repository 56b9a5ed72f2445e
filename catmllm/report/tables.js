// Filters, and tables that sort.
"use strict";

/** A select of [value, words] pairs; the first is what stands at the start. */
function choice(label, options, changed) {
    const select = make(
        "select",
        { "aria-label": label, onchange: changed },
        ...options.map(([value, words]) => make("option", { value }, words)),
    );
    return {
        node: make("label", {}, label, select),
        get value() {
            return select.value;
        },
        set value(v) {
            select.value = v;
        },
    };
}

/** Filters by adsorbate and metal of named systems. */
function byKind(systems, changed) {
    const sorted = (some) =>
        [...new Set(some)]
            .filter(Boolean)
            .sort()
            .map((name) => [name, name]);
    const adsorbate = choice("adsorbate", [["", "all"], ...sorted(systems.map((s) => s.adsorbate))], changed);
    const metal = choice("metal", [["", "all"], ...sorted(systems.flatMap((s) => s.metals))], changed);
    const fits = (s) =>
        (!adsorbate.value || s.adsorbate === adsorbate.value) &&
        (!metal.value || s.metals.includes(metal.value));
    return { nodes: [adsorbate.node, metal.node], fits };
}

/** A table in pages of 100. columns: {head, cell(row) -> text, key(row) to sort by, low(row), words}. */
function grid(columns, pick) {
    const body = make("tbody"),
        pages = make("div", { class: "pages" });
    let rows = [],
        shown = [],
        from = 0,
        order = null,
        chosen = null;
    const heads = columns.map((column) =>
        make(
            "th",
            { scope: "col", class: column.words ? "words" : null },
            make(
                "button",
                {
                    type: "button",
                    onclick: () => {
                        order =
                            order?.column === column
                                ? { column, down: !order.down }
                                : { column, down: false };
                        heads.forEach((th, k) =>
                            th.setAttribute(
                                "aria-sort",
                                columns[k] !== column ? "none" : order.down ? "descending" : "ascending",
                            ),
                        );
                        from = 0;
                        draw();
                    },
                },
                column.head,
            ),
        ),
    );
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
    const host = make("div", {}, make("div", { class: "rows", tabindex: 0 }, table), pages);
    function draw() {
        let some = rows;
        if (order) {
            const { column, down } = order,
                value = (row) => column.key(row) ?? null;
            some = [...rows].sort((a, b) => {
                const x = value(a),
                    y = value(b);
                if (x === null || y === null) return (x === null) - (y === null);
                return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
            });
        }
        shown = some.slice(from, from + 100);
        body.replaceChildren(
            ...shown.map((row) => {
                const choose = () => {
                    select(row);
                    pick(row);
                };
                return make(
                    "tr",
                    {
                        tabindex: 0,
                        "aria-selected": row === chosen,
                        onclick: choose,
                        onkeydown: (event) => {
                            if (event.key === "Enter") choose();
                        },
                    },
                    ...columns.map((c) =>
                        make(
                            "td",
                            {
                                class:
                                    [c.words && "words", c.low?.(row) && "low"].filter(Boolean).join(" ") ||
                                    null,
                            },
                            c.cell(row),
                        ),
                    ),
                );
            }),
        );
        const turn = (words, to, off) =>
            make(
                "button",
                {
                    type: "button",
                    disabled: off ? "" : null,
                    onclick: () => {
                        from = to;
                        draw();
                    },
                },
                words,
            );
        pages.replaceChildren(
            ...(some.length > 100
                ? [
                      turn("previous", from - 100, from === 0),
                      `${from + 1} to ${Math.min(from + 100, some.length)} of ${some.length}`,
                      turn("next", from + 100, from + 100 >= some.length),
                  ]
                : []),
        );
    }
    function select(row) {
        chosen = row;
        [...body.rows].forEach((tr, k) => tr.setAttribute("aria-selected", shown[k] === row));
    }
    return {
        host,
        select,
        set(some) {
            rows = some;
            from = 0;
            draw();
        },
    };
}

/** Bring a stage into sight where a narrow page has it above what was pressed. */
function reveal(host) {
    const { top, bottom } = host.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) host.scrollIntoView({ block: "nearest", behavior: PACE });
}
