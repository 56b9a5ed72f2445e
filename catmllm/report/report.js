// The live parts of report.html, each of which takes the place of its [data-live] element.
"use strict";

function parity(records) {
    const { systems, energy, colours, stages } = records.parity,
        shown = stage(records);
    const when = choice(
        "after stage",
        stages.map((s, k) => [k, s.name]),
        () => update(),
    );
    when.value = stages.length - 1;
    const kind = byKind(systems, () => update());
    const count = make("span", { class: "count", "aria-live": "polite" }),
        worst = make("div", { class: "chips" });
    let pinned = null;
    const predicted = () => stages[when.value].predicted;
    const known = (i) => energy[i] !== null && predicted()[i] !== null;
    const fits = (i) => known(i) && kind.fits(systems[i]);
    const said = (i) => ({
        structure: systems[i].structure,
        title: systems[i].name,
        facts: [
            `label ${number(energy[i])} eV, predicted ${number(predicted()[i])} eV`,
            `off by ${signed(predicted()[i] - energy[i])} eV`,
        ],
        absent: "The structures of the test systems were not at hand when this page was written.",
    });
    const chart = plot(
        () => {
            const all = energy.keys(),
                some = [...all].filter(known),
                xs = range(some.flatMap((i) => [energy[i], predicted()[i]]));
            return {
                x: "label (eV)",
                y: "predicted (eV)",
                xs,
                ys: xs,
                ratio: 0.96,
                pinned,
                lines: [
                    {
                        points: [
                            [xs[0], xs[0]],
                            [xs[1], xs[1]],
                        ],
                        colour: "var(--soft)",
                        width: 1,
                    },
                ],
                points: [...some.filter((i) => !fits(i)), ...some.filter(fits)].map((i) => ({
                    x: energy[i],
                    y: predicted()[i],
                    item: i,
                    colour: fits(i) ? colours[systems[i].adsorbate] : "var(--soft)",
                    pale: fits(i) ? 0.85 : 0.13,
                    still: !fits(i),
                    text: [systems[i].name, ...said(i).facts].join("\n"),
                })),
            };
        },
        {
            label: "parity plot of predicted against labelled energies",
            over: (point) => shown.show(said(point ? point.item : pinned)),
            pick: (point) => {
                pinned = point.item;
                shown.show(said(pinned));
                chart.draw();
            },
        },
    );
    function update() {
        const some = [...energy.keys()].filter(fits),
            off = some.map((i) => predicted()[i] - energy[i]);
        const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
        count.textContent = some.length
            ? `n ${some.length} · MAE ${number(mean(off.map(Math.abs)), 3)} eV · bias ${signed(
                  mean(off),
                  3,
              )} eV`
            : "no system fits";
        const far = some
            .map((i, k) => [Math.abs(off[k]), i])
            .sort((a, b) => b[0] - a[0])
            .slice(0, 5);
        worst.replaceChildren(
            "Farthest off:",
            ...far.map(([, i]) =>
                make(
                    "button",
                    {
                        type: "button",
                        onclick: () => {
                            pinned = i;
                            shown.show(said(i));
                            chart.draw();
                        },
                    },
                    `${systems[i].name} ${signed(predicted()[i] - energy[i])}`,
                ),
            ),
        );
        if (far.length && (pinned === null || !fits(pinned))) pinned = far[0][1];
        chart.draw();
        if (pinned !== null) shown.show(said(pinned));
    }
    const key = make(
        "div",
        { class: "key" },
        ...Object.entries(colours).map(([name, colour]) =>
            make("span", {}, make("span", { class: "dot", style: `background:${colour}` }), name),
        ),
    );
    return [
        make("div", { class: "filters" }, when.node, ...kind.nodes, count),
        make("div", { class: "side equal" }, make("div", {}, chart.host, key, worst), shown.host),
        update,
    ];
}

function tasks(records) {
    const { rows, judge, tolerance, colour } = records.tasks,
        shown = stage(records);
    const kind = byKind(rows, () => update());
    const outcomes = [...new Set(rows.map((row) => row.outcome))].sort();
    const outcome = choice("outcome", [["", "all"], ...outcomes.map((o) => [o, o])], () => update());
    const count = make("span", { class: "count", "aria-live": "polite" });
    const miss = (row) =>
        (row.judged ?? row.predicted) === null ||
        (row.judged ?? row.predicted) === undefined ||
        row.outcome === "refused"
            ? null
            : Math.abs((row.judged ?? row.predicted) - row.energy);
    const energies = (row) =>
        `wanted ${number(row.energy)} eV, predicted ${number(row.predicted)} eV` +
        (judge ? `, ${judge} ${number(row.judged)} eV` : "");
    const fits = (row) => kind.fits(row) && (!outcome.value || row.outcome === outcome.value);
    let chosen = [...rows].sort((a, b) => (miss(a) ?? Infinity) - (miss(b) ?? Infinity))[0];
    const chart = plot(
        () => {
            const some = rows.filter((row) => row.trace.length && fits(row));
            const last = Math.max(1, ...rows.map((row) => row.trace.length - 1));
            const best = (row) => row.trace.map(([off], k) => [k, off]);
            const top = Math.max(
                tolerance * 1.5,
                ...chosen.trace.flat().filter((v) => v !== null),
                ...some.flatMap((row) => row.trace.map(([off]) => off)),
            );
            return {
                title: `Search for ${chosen.name}`,
                x: "iteration of the closed loop",
                y: "off the wanted energy (eV)",
                xs: [0, last],
                ys: [0, top * 1.04],
                ratio: 0.62,
                pinned: chosen,
                lines: [
                    ...some.map((row) => ({
                        points: best(row),
                        colour: "var(--soft)",
                        width: 1,
                        pale: 0.28,
                    })),
                    {
                        points: [
                            [0, tolerance],
                            [last, tolerance],
                        ],
                        colour: "var(--ink)",
                        width: 1,
                        dash: "5 4",
                    },
                    {
                        points: chosen.trace.map(([, mean], k) => [k, mean]),
                        colour: "var(--accent)",
                        dash: "2 3",
                        width: 2,
                    },
                    { points: best(chosen), colour, width: 3 },
                ],
                points: some.flatMap((row) =>
                    best(row)
                        .filter(([, off]) => off !== null)
                        .map(([x, y]) => ({
                            x,
                            y,
                            item: row,
                            colour: row === chosen ? colour : null,
                            text:
                                `${row.name}, wanted ${number(row.energy)} eV\niteration ${x}: best ${number(
                                    y,
                                )} eV off` +
                                (row.trace[x][1] === null
                                    ? ""
                                    : `, its candidates ${number(row.trace[x][1])} eV`),
                        })),
                ),
            };
        },
        { label: "search traces of the tasks", pick: (point) => choose(point.item) },
    );
    const list = grid(
        [
            { head: "system", words: true, cell: (r) => r.name, key: (r) => r.name },
            { head: "wanted", cell: (r) => number(r.energy), key: (r) => r.energy },
            { head: "predicted", cell: (r) => number(r.predicted), key: (r) => r.predicted },
            ...(judge ? [{ head: judge, cell: (r) => number(r.judged), key: (r) => r.judged }] : []),
            { head: "off by", cell: (r) => number(miss(r)), key: miss },
            {
                head: "outcome",
                words: true,
                cell: (r) => r.outcome,
                key: (r) => r.outcome,
                low: (r) => r.outcome !== "hit",
            },
        ],
        (row) => choose(row, true),
    );
    function choose(row, pressed = false) {
        chosen = row;
        list.select(row);
        shown.show({
            structure: row.structure,
            title: row.name,
            facts: [energies(row), row.outcome + (row.why ? `: ${row.why}` : "")],
            text: row.text,
            absent: row.text
                ? "No cell of whole atoms can be read from this answer."
                : "No candidate could be read.",
        });
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
        const turn = () => {
            choose(row);
            shown.host.scrollIntoView({ block: "center", behavior: PACE });
        };
        card.querySelector(".views")?.addEventListener("click", turn);
        card.append(make("button", { type: "button", onclick: turn }, "turn it in 3D"));
    }
    const key = make(
        "div",
        { class: "key" },
        ...[
            [colour, "best of the pool"],
            ["var(--accent)", "candidates of the iteration, mean"],
            ["var(--soft)", "other tasks"],
        ].map(([paint, words]) =>
            make("span", {}, make("span", { class: "dot", style: `background:${paint}` }), words),
        ),
        `dashed: tolerance ${tolerance} eV`,
    );
    return [
        make("div", { class: "filters" }, ...kind.nodes, outcome.node, count),
        make("div", { class: "side" }, make("div", {}, chart.host, key, list.host), shown.host),
        update,
    ];
}

function answers(records) {
    const { terms, systems } = records.answers,
        shown = stage(records);
    const first = 5 + terms.length;
    const rows = records.answers.rows.map((r) => ({
        stage: r[0],
        free: r[1],
        system: systems[r[2]],
        energy: r[3],
        reward: r[4],
        terms: r.slice(5, first),
        reason: r[first],
        fault: r[first + 1],
        structure: r[first + 2],
        text: r[first + 3],
    }));
    const term = (row, name) => row.terms[terms.indexOf(name)];
    // by the names of the table of failures
    const checks = {
        PF: (r) => r.reason !== null,
        VF: (r) => r.reason === null && term(r, "valid") < 10,
        CM: (r) => r.reason === null && term(r, "comp") < 10,
        PV: (r) => r.reason === null && term(r, "phys") < 10,
        AD: (r) => r.fault !== null,
    };
    const words = {
        PF: "unreadable",
        VF: "out of bounds",
        CM: "wrong atoms",
        PV: "too close or sparse",
        AD: "no real adsorbate",
    };
    for (const row of rows) row.fails = Object.keys(checks).filter((name) => checks[name](row));
    const wrong = (r) =>
        r.fails.map((name) => ({ PF: `PF: ${r.reason}`, AD: `AD: ${r.fault}` })[name] ?? name).join(", ");
    const kind = byKind(systems, () => update());
    const when = choice(
        "after stage",
        [["", "all"], ...[...new Set(rows.map((r) => r.stage))].map((s) => [s, s])],
        () => update(),
    );
    const way = choice(
        "decoding",
        [
            ["", "all"],
            ["held", "held by the grammar"],
            ["free", "free"],
        ],
        () => update(),
    );
    const fault = choice(
        "fails",
        [
            ["", "all"],
            ["none", "nothing"],
            ["any", "anything"],
            ...Object.entries(words).map(([name, says]) => [
                name,
                `${name}: ${says} (${rows.filter((r) => r.fails.includes(name)).length})`,
            ]),
        ],
        () => update(),
    );
    const search = make("input", {
        type: "search",
        size: 14,
        placeholder: "Pt9Au3 or loop",
        oninput: () => update(),
    });
    const count = make("span", { class: "count", "aria-live": "polite" });
    const after = (r) => r.stage + (r.free ? ", free" : "");
    const asked = (r) => (r.energy === null ? "a CIF" : `${number(r.energy)} eV`);
    const list = grid(
        [
            { head: "system", words: true, cell: (r) => r.system.name, key: (r) => r.system.name },
            { head: "fails", words: true, cell: (r) => wrong(r) || DASH, key: wrong },
            {
                head: "after",
                words: true,
                cell: (r) => after(r),
                key: after,
            },
            { head: "asked", cell: asked, key: (r) => r.energy },
            { head: "R", cell: (r) => number(r.reward), key: (r) => r.reward, low: (r) => r.reward < 10 },
            ...terms.map((name, k) => ({
                head: name,
                cell: (r) => short(r.terms[k]),
                key: (r) => r.terms[k],
                low: (r) => r.terms[k] < 10,
            })),
        ],
        (row) => {
            show(row);
            reveal(shown.host);
        },
    );
    const show = (r) =>
        shown.show({
            structure: r.structure,
            title: r.system.name,
            facts: [
                `after ${after(r)}; asked for ${r.energy === null ? "" : "a structure at "}${asked(r)}`,
                [`R ${number(r.reward)}`, ...terms.map((name, k) => `${name} ${short(r.terms[k])}`)].join(
                    " · ",
                ),
                ...(r.fails.length ? [`fails: ${wrong(r)}`] : []),
            ],
            text: r.text,
            open: r.structure === null,
            absent: r.reason
                ? `Unreadable (${r.reason}): see its text.`
                : "No cell of whole atoms can be drawn from it.",
        });
    let started = false;
    function update() {
        const sought = search.value.trim().toLowerCase();
        const some = rows.filter(
            (r) =>
                kind.fits(r.system) &&
                (!when.value || r.stage === when.value) &&
                (!way.value || r.free === (way.value === "free")) &&
                (!fault.value ||
                    (fault.value === "none"
                        ? !r.fails.length
                        : fault.value === "any"
                          ? r.fails.length
                          : r.fails.includes(fault.value))) &&
                (!sought || `${r.system.name} ${wrong(r)}`.toLowerCase().includes(sought)),
        );
        count.textContent = `${some.length} of ${rows.length} answers`;
        list.set(some);
        if (started) return;
        started = true;
        const drawn = some.find((r) => r.structure !== null) ?? some[0];
        list.select(drawn);
        show(drawn);
    }
    return [
        make(
            "div",
            { class: "filters" },
            when.node,
            way.node,
            fault.node,
            ...kind.nodes,
            make("label", {}, "search", search),
            count,
        ),
        make("div", { class: "side" }, list.host, shown.host),
        update,
    ];
}

function training(records) {
    const panels = make("div", { class: "panels" }),
        chips = make("div", { class: "chips" });
    let plots = [];
    function curve(of, { title, steps, values }, name) {
        const window = Math.floor(values.length / 15),
            mean = [];
        if (window >= 3) {
            let sum = 0;
            values.forEach((v, i) => {
                sum += v - (i >= window ? values[i - window] : 0);
                if (i >= window - 1) mean.push([steps[i - (window >> 1)], sum / window]);
            });
        }
        const line = steps.map((s, i) => [s, values[i]]);
        return plot(() => ({
            title: name ? `${of.name}: ${title}` : title,
            xs: [steps[0], steps[steps.length - 1]],
            ys: range(values),
            ratio: 0.62,
            by: "x",
            label: `${title} of ${of.name} over its steps`,
            lines: mean.length
                ? [
                      { points: line, colour: of.colour, width: 1, pale: 0.4 },
                      { points: mean, colour: of.colour, width: 2 },
                  ]
                : [{ points: line, colour: of.colour, width: 1.6 }],
            points: line.map(([x, y]) => ({ x, y, text: `${of.name}, step ${x}\n${title} ${number(y, 4)}` })),
        }));
    }
    function open(of) {
        const chosen = of
            ? of.curves.map((c) => [of, c, false])
            : records.training.flatMap((s) => s.curves.slice(0, 2).map((c) => [s, c, true]));
        plots = chosen.filter(([, c]) => c.steps.length).map((c) => curve(...c));
        panels.replaceChildren(...plots.map((p) => p.host));
        plots.forEach((p) => p.draw());
        buttons.forEach((button, k) =>
            button.setAttribute("aria-pressed", (k ? records.training[k - 1] : null) === of),
        );
    }
    const buttons = [null, ...records.training].map((of) =>
        make("button", { type: "button", onclick: () => open(of) }, of ? of.name : "all stages"),
    );
    chips.append(...buttons);
    return [chips, panels, () => open(null)];
}

async function begin() {
    const packed = Uint8Array.from(atob(document.getElementById("records").textContent), (c) =>
        c.charCodeAt(0),
    );
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const records = JSON.parse(await new Response(stream).text());
    document.body.append(tip);
    for (const [name, build] of Object.entries({ parity, tasks, answers, training })) {
        const place = document.querySelector(`[data-live=${name}]`);
        if (!place || !records[name]) continue;
        const still = [...place.childNodes];
        try {
            const parts = build(records),
                start = parts.pop();
            place.replaceChildren(...parts);
            start();
        } catch (error) {
            // the picture that needs no script stays
            place.replaceChildren(...still);
            console.error(name, error);
        }
    }
    document.documentElement.dataset.live = "yes";
}

begin();
