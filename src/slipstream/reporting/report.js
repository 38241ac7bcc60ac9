"use strict";
// Draws the report from the JSON in #data. Everything a model wrote enters the page through textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const alpha = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");

  // ---- curves ----

  // A band as one closed shape for each stretch without gaps: plotly's fill between two lines crosses over at a gap.
  function outline(curve) {
    const x = [], y = [];
    let stretch = [];
    const close = () => {
      const back = stretch.slice().reverse();
      x.push(...stretch.map((k) => curve.x[k]), ...back.map((k) => curve.x[k]), null);
      y.push(...stretch.map((k) => curve.low[k]), ...back.map((k) => curve.high[k]), null);
      stretch = [];
    };
    curve.x.forEach((_, k) => { if (curve.low[k] === null || curve.high[k] === null) close(); else stretch.push(k); });
    close();
    return { x, y };
  }

  function traces(figure) {
    const out = [], format = figure.percent ? ".3~p" : ".4~g";
    figure.curves.forEach((curve, i) => {
      const ink = color(`--c${i % 6}`);
      if (curve.low) {
        out.push({ ...outline(curve), fill: "toself", fillcolor: alpha(ink, 0.16), mode: "lines", line: { width: 0 },
          hoverinfo: "skip", showlegend: false, legendgroup: curve.name });
      }
      const few = curve.y.filter((v) => v !== null).length <= 25;
      const area = curve.style === "area";
      out.push({
        x: curve.x, y: curve.y, name: curve.band ? `${curve.name}, ${curve.band}` : curve.name, legendgroup: curve.name,
        mode: !area && (few || curve.style === "points") ? "lines+markers" : "lines",
        line: { color: ink, width: area ? 0.5 : 1.8 }, marker: { size: 5, color: ink },
        // One box shows the nearest point of every curve: a sparse one says which step its point is of.
        customdata: curve.low && curve.low.map((low, k) => [low, curve.high[k]]),
        hovertemplate: `%{y:${format}}` + (curve.low ? ` (%{customdata[0]:${format}} to %{customdata[1]:${format}})` : "")
          + (curve.style === "points" && figure.curves.length > 1 ? " at step %{x}" : ""),
        ...(area ? { stackgroup: "all", fillcolor: alpha(ink, 0.65) } : {}),
      });
    });
    return out;
  }

  const steps = data.figures.flatMap((figure) => figure.curves.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]]));
  const first = Math.min(...steps), last = Math.max(...steps), pad = Math.max((last - first) * 0.025, 0.5);

  function layout(figure) {
    const muted = color("--muted"), line = color("--line");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: muted }, automargin: true };
    const values = figure.curves.flatMap((curve) => [...curve.y, ...(curve.low || []), ...(curve.high || [])]);
    const top = values.reduce((a, b) => (b === null ? a : Math.max(a, b)), -Infinity);
    const bottom = values.reduce((a, b) => (b === null ? a : Math.min(a, b)), Infinity);
    let scale = {};
    if (figure.percent && bottom >= 0 && top > 0.4) scale = { range: [-0.03, 1.03], dtick: 0.25 };
    else if (top - bottom <= 1e-6 * Math.abs(top)) scale = { range: [Math.min(0, 1.4 * top), Math.max(0, 1.4 * top) || 1] };
    else if (bottom >= 0 && bottom < 0.5 * top) scale = { rangemode: "tozero" };
    return {
      margin: { l: 46, r: 16, t: 8, b: 36 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--ink") },
      xaxis: { ...axis, showgrid: false, zeroline: false, nticks: 6, hoverformat: ",d", title: { text: "step", standoff: 4, font: { size: 12, color: muted } },
        unifiedhovertitle: { text: "step %{x}" }, 
        range: [first - pad, last + pad], ...(last - first < 6 ? { dtick: 1 } : {}) },
      yaxis: { ...axis, nticks: 5, zeroline: bottom < 0, tickformat: figure.percent ? ".3~p" : "", exponentformat: figure.unit === "bytes" ? "SI" : "e", ...scale },
      hovermode: "x unified", hoverlabel: { bgcolor: color("--card"), bordercolor: line, font: { size: 12 } },
      showlegend: figure.curves.length > 1 || Boolean(figure.curves[0].low),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12, color: muted }, bgcolor: "rgba(0,0,0,0)" },
      dragmode: "zoom", uirevision: "kept", // a change of theme keeps the zoom
    };
  }

  const options = {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtons: [["toImage", "resetScale2d"]], displayModeBar: false,
  };
  const plots = [...document.querySelectorAll(".plot")];
  function draw() {
    for (const node of plots) {
      const figure = data.figures[Number(node.dataset.figure)];
      Plotly.react(node, traces(figure), layout(figure), options);
      if (!node.dataset.listens) {
        node.dataset.listens = "yes";
        node.on("plotly_click", (event) => openStep(event.points[0].x));
      }
    }
  }

  function setTheme(name) {
    root.dataset.theme = name;
    draw();
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

  // ---- completions ----

  const { names, prompts, rows } = data.browser;
  const PAGE = 60;
  const state = { mode: "train", steps: [], at: 0, limit: PAGE };
  let openStep = () => {};

  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function option(value, text) {
    const node = element("option", "", text);
    node.value = value;
    return node;
  }

  const shown = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
  const range = names.map((_, i) => {
    const values = rows.map((row) => row.r[i]).filter((value) => value !== null);
    return values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  });

  function fact(list, name, value, share, className) {
    const line = element("div"), label = element("dt");
    name.split("_").forEach((word, i) => label.append(...(i ? ["_", document.createElement("wbr")] : []), word));
    line.append(label);
    const bar = element("span", share === null ? "" : "bar");
    if (share !== null) {
      const fill = element("i");
      fill.style.width = `${100 * share}%`;
      bar.append(fill);
    }
    line.append(bar, element("dd", className, value));
    list.append(line);
  }

  function textBlock(text, label) {
    const node = element("div", text ? "text" : "text empty", text || "(empty)");
    node.dir = "auto";
    node.dataset.label = label;
    return node;
  }

  function card(row) {
    const node = element("article", "answer");
    const facts = element("div", "facts");
    const list = element("dl");
    names.forEach((name, i) => {
      const [low, high] = range[i];
      const share = row.r[i] === null || high <= low ? null : (row.r[i] - low) / (high - low);
      fact(list, name, shown(row.r[i]), share, "");
    });
    if (row.m === "train") {
      const sign = row.a > 0 ? "up" : row.a < 0 ? "down" : "";
      fact(list, "advantage", (row.a > 0 ? "+" : "") + shown(row.a), null, sign);
    }
    const foot = element("p", "foot");
    foot.append(element("span", "", `${row.l} tokens`), element("span", "", `weight version ${row.v}`));
    if (row.t) foot.append(element("span", "badge", "truncated"));
    facts.append(list, foot);
    node.append(textBlock(row.c, "Completion"), facts);
    return node;
  }

  function compare(a, b) {
    const [key, direction] = byId("sort").value.split(":");
    if (key === "order") return 0;
    const read = (row) => (key === "a" ? row.a : key === "l" ? row.l : row.r[Number(key)]);
    const x = read(a), y = read(b);
    if (x === null || y === null) return (x === null) - (y === null); // not scored: last, either way
    return direction === "down" ? y - x : x - y;
  }

  function matches(row) {
    const show = byId("show").value, find = byId("find").value.toLowerCase();
    if (show === "up" && !(row.a > 0)) return false;
    if (show === "down" && !(row.a < 0)) return false;
    if (show === "cut" && !row.t) return false;
    if (show === "ended" && row.t) return false;
    return !find || row.c.toLowerCase().includes(find) || prompts[row.p].toLowerCase().includes(find);
  }

  function render() {
    const step = state.steps[state.at];
    const all = rows.filter((row) => row.s === step && row.m === state.mode);
    const found = all.filter(matches).sort(compare);
    byId("step-shown").textContent = step;
    byId("step").setAttribute("aria-valuetext", `step ${step}`);
    byId("step").value = state.at;
    byId("back").disabled = state.at === 0;
    byId("next").disabled = state.at === state.steps.length - 1;
    const scores = names.map((name, i) => {
      const values = found.map((row) => row.r[i]).filter((value) => value !== null);
      return values.length ? `, mean ${name} ${shown(values.reduce((a, b) => a + b, 0) / values.length)}` : "";
    });
    byId("count").textContent = `${found.length} of ${all.length} completions${scores.join("")}`;
    const cards = [];
    found.slice(0, state.limit).forEach((row, i) => {
      if (i === 0 || found[i - 1].p !== row.p) { // completions of one prompt that follow each other share its box
        const head = element("div", "prompt");
        head.append(element("div", "label", "Prompt"), textBlock(prompts[row.p], "Prompt"));
        cards.push(element("div", "group"));
        cards.at(-1).append(head);
      }
      cards.at(-1).append(card(row));
    });
    byId("cards").replaceChildren(...cards);
    byId("more").hidden = found.length <= state.limit;
    for (const node of byId("cards").querySelectorAll(".text")) {
      if (node.scrollHeight > node.clientHeight + 1) {
        node.tabIndex = 0; // a scrolling box must be reachable by keyboard
        node.setAttribute("role", "region");
        node.setAttribute("aria-label", node.dataset.label);
      }
    }
  }

  function nearest(step) {
    let best = 0;
    state.steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(state.steps[best] - step)) best = i; });
    return best;
  }

  function setMode(mode, step) {
    state.mode = mode;
    state.steps = [...new Set(rows.filter((row) => row.m === mode).map((row) => row.s))].sort((a, b) => a - b);
    state.at = nearest(step);
    byId("step").max = state.steps.length - 1;
  }

  function goTo(at) {
    state.at = Math.max(0, Math.min(at, state.steps.length - 1));
    state.limit = PAGE;
    render();
  }

  function startBrowser() {
    const modes = [["train", "training"], ["eval", "held-out"]].filter(([mode]) => rows.some((row) => row.m === mode));
    byId("mode").replaceChildren(...modes.map(([mode, name]) => option(mode, name)));
    byId("mode").parentElement.hidden = modes.length < 2;
    const orders = [option("order:", "as sampled")];
    names.forEach((name, i) => orders.push(option(`${i}:down`, `${name}, high first`), option(`${i}:up`, `${name}, low first`)));
    orders.push(option("a:down", "advantage, high first"), option("a:up", "advantage, low first"));
    orders.push(option("l:down", "longest first"), option("l:up", "shortest first"));
    byId("sort").replaceChildren(...orders);
    byId("step").addEventListener("input", (event) => goTo(Number(event.target.value)));
    byId("back").addEventListener("click", () => goTo(state.at - 1));
    byId("next").addEventListener("click", () => goTo(state.at + 1));
    byId("mode").addEventListener("change", (event) => { setMode(event.target.value, state.steps[state.at]); goTo(state.at); });
    for (const id of ["sort", "show"]) byId(id).addEventListener("change", () => goTo(state.at));
    byId("find").addEventListener("input", () => goTo(state.at));
    byId("more").addEventListener("click", () => { state.limit += PAGE; render(); });
    openStep = (step) => { goTo(nearest(step)); byId("completions").scrollIntoView(); };
    setMode(modes[0][0], Infinity);
    goTo(state.steps.length - 1);
  }

  setTheme(dark.matches ? "dark" : "light");
  if (rows.length) startBrowser();
})();
