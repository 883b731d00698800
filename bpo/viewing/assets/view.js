// The page of `bpo view`. Data come as calls of bpoIndex and bpoChunk; texts of the data set only ever become text nodes.
"use strict";
(() => {
  const PAGE = 20;
  const FIELDS = ["search", "type", "reason", "min-words", "max-words", "max-margin", "order", "ratios"];
  const byId = (id) => document.getElementById(id);
  const chunks = new Map(); // number -> array of records
  const waiting = new Map(); // number -> functions to call when it is there
  let index = null;
  let found = [];
  let page = 0;
  let current = -1; // of the records on the page
  let run = 0; // counts filterings: a search that another one overtook stops
  let seed = 1;

  window.bpoIndex = (value) => {
    index = value;
    const column = Object.fromEntries(index.columns.map((name, at) => [name, at]));
    index.rows = index.rows.map((row) => Object.fromEntries(index.columns.map((name) => [name, row[column[name]]])));
    fill(byId("type"), index.rows.flatMap((row) => row.types));
    fill(byId("reason"), index.rows.flatMap((row) => row.reasons));
    byId("margin-label").hidden = !index.rows.some((row) => row.margin !== null);
    byId("ratios").parentElement.hidden = byId("margin-label").hidden;
    readHash();
    filter();
  };
  window.bpoChunk = ([number, records]) => {
    chunks.set(number, records);
    for (const done of waiting.get(number) || []) done();
    waiting.delete(number);
  };

  function fill(select, values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
    for (const [value, count] of [...counts].sort()) select.append(element("option", { value }, `${value} (${count})`));
  }

  function load(number) {
    if (chunks.has(number)) return Promise.resolve();
    return new Promise((done, failed) => {
      if (waiting.has(number)) return waiting.get(number).push(done);
      waiting.set(number, [done]);
      const script = element("script", { src: `data/${String(number).padStart(5, "0")}.js` });
      script.onerror = () => failed(new Error(`data/${number} cannot be read`));
      script.onload = () => script.remove();
      document.head.append(script);
    });
  }

  const chunkOf = (record) => Math.floor(record / index.chunk);
  const recordAt = (record) => chunks.get(chunkOf(record))[record % index.chunk];

  function element(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "class") node.className = value;
      else if (value !== false && value !== null) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children); // strings become text nodes
    return node;
  }

  // ------------------------------------------------------------------ filters

  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

  async function filter() {
    const mine = ++run;
    const [type, reason, order] = ["type", "reason", "order"].map((id) => byId(id).value);
    const [least, most, margin] = ["min-words", "max-words", "max-margin"].map(number);
    let rows = index.rows
      .map((row, at) => at)
      .filter((at) => {
        const row = index.rows[at];
        return (
          (!type || row.types.includes(type)) &&
          (!reason || row.reasons.includes(reason)) &&
          (least === null || row.words >= least) &&
          (most === null || row.words <= most) &&
          (margin === null || (row.margin !== null && row.margin < margin))
        );
      });
    const query = byId("search").value.trim().toLocaleLowerCase();
    if (query) rows = await search(rows, query, mine);
    if (mine !== run) return;
    found = sorted(rows, order);
    page = 0;
    current = -1;
    writeHash();
    await show();
  }

  // Texts lie in the chunks, so the first search reads them all, a few at a time.
  async function search(rows, query, mine) {
    const hits = [];
    for (let start = 0; start < rows.length && mine === run; start += 20 * index.chunk) {
      const part = rows.slice(start, start + 20 * index.chunk);
      await Promise.all([...new Set(part.map(chunkOf))].map(load));
      for (const at of part) if (textOf(recordAt(at)).includes(query)) hits.push(at);
      status(`searching ... ${Math.min(100, Math.round((100 * (start + part.length)) / rows.length))} %`);
      await new Promise((done) => setTimeout(done));
    }
    return hits;
  }

  function textOf(record) {
    if (record.haystack === undefined) {
      const said = (one) => one.segments.map(([op, text]) => (op === "-" ? "" : text)).join("");
      const texts = [record.id, ...record.prompt.map((turn) => turn.text)];
      texts.push(...record.completions.map(said), ...record.refused.map(said));
      record.haystack = texts.join("\n").toLocaleLowerCase();
    }
    return record.haystack;
  }

  function sorted(rows, order) {
    const key = { margin: (at) => index.rows[at].margin ?? Infinity, words: (at) => -index.rows[at].words }[order];
    if (key) return rows.sort((a, b) => key(a) - key(b) || a - b);
    if (order !== "random") return rows;
    let state = seed;
    const draw = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
    for (let last = rows.length - 1; last > 0; last--) {
      const other = Math.floor(draw() * (last + 1));
      [rows[last], rows[other]] = [rows[other], rows[last]];
    }
    return rows;
  }

  function readHash() {
    const values = new URLSearchParams(location.hash.slice(1));
    for (const id of FIELDS) {
      if (id === "ratios") byId(id).checked = values.get(id) === "1";
      else byId(id).value = values.get(id) ?? (id === "order" ? "file" : "");
    }
    seed = Number(values.get("seed")) || seed;
  }

  function writeHash() {
    const values = new URLSearchParams();
    for (const id of FIELDS) {
      const value = id === "ratios" ? (byId(id).checked ? "1" : "") : byId(id).value;
      if (value && !(id === "order" && value === "file")) values.set(id, value);
    }
    if (byId("order").value === "random") values.set("seed", seed);
    history.replaceState(null, "", values.size ? `#${values}` : location.pathname);
  }

  // ------------------------------------------------------------------ records

  const status = (text) => { byId("status").textContent = text; };

  async function show() {
    const mine = run;
    const records = found.slice(page * PAGE, (page + 1) * PAGE);
    try {
      await Promise.all([...new Set(records.map(chunkOf))].map(load));
    } catch (error) {
      status(error.message);
      return;
    }
    if (mine !== run) return;
    byId("records").replaceChildren(...records.map((at) => article(recordAt(at), at)));
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= last;
    const first = page * PAGE + 1;
    status(
      found.length
        ? `${first}\u2013${first + records.length - 1} of ${found.length.toLocaleString("en")} records`
        : "no record passes the filters",
    );
  }

  function article(record, at) {
    const margin = record.margin === null ? "" : `margin ${record.margin.toFixed(2)} nats`;
    const title = element("h2", {}, record.id, element("small", {}, `record ${at + 1}`), element("small", {}, margin));
    const body = element("div", {});
    for (const turn of record.prompt) body.append(element("p", { class: "prompt" }, element("b", {}, turn.role), ` ${turn.text}`));
    for (const completion of record.completions) body.append(completionBlock(completion, completion.score === bestScore(record)));
    for (const refused of record.refused) body.append(refusedBlock(refused));
    return element("article", { tabindex: "-1", "aria-label": record.id }, title, pictures(record), body);
  }

  const bestScore = (record) => Math.max(...record.completions.map((c) => c.score));

  function pictures(record) {
    const box = element("div", { class: "pictures" });
    if (record.image) box.append(figure(record.image, record.files[0], "the image"));
    if (record.error) box.append(element("p", { class: "problem" }, record.error));
    for (const [at, weak] of Object.entries(record.weakened)) {
      const completion = record.completions[at];
      const step = completion.provenance.noise_step === undefined ? "" : `, t = ${completion.provenance.noise_step}`;
      box.append(figure(weak.path, `weakened for ${completion.type}${step}${weak.note ? ` (${weak.note})` : ""}`, "the weakened image"));
    }
    return box;
  }

  function figure(path, caption, alt) {
    const picture = element("img", { src: path, alt, loading: "lazy", decoding: "async" });
    return element("figure", {}, picture, element("figcaption", {}, caption));
  }

  function completionBlock(completion, isBest) {
    const facts = [`score ${completion.score}`, `${completion.words} words`];
    if (completion.log_ratio !== undefined) facts.push(`log-ratio ${completion.log_ratio.toFixed(2)}`);
    for (const [name, value] of Object.entries(completion.provenance)) facts.push(`${name.replaceAll("_", " ")} ${value}`);
    const head = element("header", {}, element("span", { class: "type" }, completion.type), element("span", { class: "facts" }, facts.join(" \u00b7 ")));
    const coloured = byId("ratios").checked && completion.tokens;
    const text = element("p", { class: "text" }, ...(coloured ? tokens(completion.tokens) : segments(completion.segments)));
    return element("section", { class: isBest ? "completion best" : "completion" }, head, text);
  }

  function refusedBlock(refused) {
    const head = element("header", {}, element("span", { class: "type" }, `refused: ${refused.source}`), element("span", { class: "facts" }, `${refused.reason} \u00b7 ${refused.detail}`));
    return element("section", { class: "completion refused" }, head, element("p", { class: "text" }, ...segments(refused.segments)));
  }

  function segments(list) {
    return list.map(([op, text, object]) => {
      const inner = object ? element("mark", { title: `object: ${object}` }, text) : text;
      if (op === "+") return element("ins", {}, inner);
      if (op === "-") return element("del", {}, inner);
      return object ? inner : document.createTextNode(text);
    });
  }

  function tokens(list) {
    return list.map(([text, ratio]) => {
      const size = Math.min(1, Math.abs(ratio) / 2);
      const kind = size < 0.05 ? "" : ratio > 0 ? " more" : " less";
      const node = element("span", { class: `token${kind}${size > 0.6 ? " strong" : ""}`, title: `${ratio > 0 ? "+" : ""}${ratio} nats` }, text);
      node.style.setProperty("--strength", size.toFixed(2));
      return node;
    });
  }

  // ------------------------------------------------------------------ keys

  async function turn(by) {
    const next = page + by;
    if (next < 0 || next * PAGE >= found.length) return false;
    page = next;
    current = -1;
    await show();
    scrollTo(0, byId("filters").offsetTop);
    return true;
  }

  async function step(by) {
    const shown = byId("records").children;
    let next = current + by;
    if (next >= shown.length) {
      if (!(await turn(1))) return;
      next = 0;
    } else if (next < 0) {
      if (!(await turn(-1))) return;
      next = byId("records").children.length - 1;
    }
    current = next;
    byId("records").children[current].focus();
    byId("records").children[current].scrollIntoView({ block: "start" });
  }

  function sample() {
    seed = 1 + Math.floor(Math.random() * 2 ** 31);
    byId("order").value = "random";
    filter();
  }

  const keys = {
    j: () => step(1),
    k: () => step(-1),
    n: () => turn(1),
    p: () => turn(-1),
    r: sample,
    t: () => { byId("ratios").checked = !byId("ratios").checked; writeHash(); show(); },
    s: () => { byId("statistics").open = !byId("statistics").open; },
    "/": () => byId("search").focus(),
    "?": () => byId("help").showModal(),
    Escape: () => byId("filters").reset(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  let pause = 0;
  byId("filters").addEventListener("input", (event) => {
    clearTimeout(pause);
    if (event.target.id === "ratios") { writeHash(); show(); return; }
    pause = setTimeout(filter, event.target.id === "search" ? 200 : 0);
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(filter));
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", () => { readHash(); filter(); });
})();
