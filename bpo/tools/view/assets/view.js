// Filters, order and keys of the `bpo view` page. Data files call bpoIndex, bpoChunk and bpoTexts; records.js renders.
"use strict";
(() => {
  const PAGE = 20;
  const KEPT_CHUNKS = 100;
  const FIELDS = {
    search: "", source: "", refused: "", "length-of": "longest", "min-words": "", "max-words": "", "min-margin": "",
    "max-margin": "", "measure-of": "blind", "min-measure": "", "max-measure": "", order: "file",
  };
  const [TYPE, SOURCE, WORDS, BEST, MARGIN, BLIND, SEEING] = [0, 1, 2, 3, 4, 5, 6]; // of a completion in the index
  const MEASURED_ORDERS = ["blind", "not-blind", "seeing"];
  const { element, article, highlight } = bpoRecords;
  const byId = (id) => document.getElementById(id);
  const chunks = new Map(); // number -> array of records, in order of last use
  const texts = new Map(); // number -> array of searched texts
  const waiting = new Map(); // file name -> promise that settles when it is loaded
  let index = null;
  let found = [];
  let page = 0;
  let current = -1; // index of the focused record on the page
  let run = 0; // number of the latest filter run; earlier runs stop
  let seed = 1;

  // ------------------------------------------------------------------ data

  window.bpoIndex = (value) => {
    index = value;
    index.rows = value.rows.map(([id, completions, refused]) => {
      const margins = completions.map((completion) => completion[MARGIN]).filter((margin) => margin !== null);
      return {
        id, completions, refused,
        words: completions.reduce((most, completion) => Math.max(most, completion[WORDS]), 0),
        margin: margins.length ? Math.min(...margins) : null,
      };
    });
    fillSources();
    fillRefused();
    const scored = index.rows.some((row) => row.margin !== null);
    for (const node of document.querySelectorAll(".scored")) node.hidden = !scored;
    if (!scored) byId("order").querySelector("[value=margin]").remove();
    const measured = index.rows.some((row) => row.completions.some(isMeasured));
    for (const node of document.querySelectorAll(".measured")) node.hidden = !measured;
    if (!measured) for (const order of MEASURED_ORDERS) byId("order").querySelector(`[value=${order}]`).remove();
    readHash();
    filter(page);
  };

  window.bpoChunk = ([number, records]) => {
    chunks.set(number, records);
    for (const oldest of chunks.keys()) if (chunks.size > KEPT_CHUNKS) chunks.delete(oldest);
  };
  window.bpoTexts = ([number, value]) => texts.set(number, value);

  function loadScript(name) {
    if (!waiting.has(name)) {
      waiting.set(name, new Promise((done, failed) => {
        const script = element("script", { src: name });
        const end = (settle) => () => { script.remove(); waiting.delete(name); settle(new Error(`${name} cannot be read`)); };
        script.onload = end(done);
        script.onerror = end(failed);
        document.head.append(script);
      }));
    }
    return waiting.get(name);
  }
  const padded = (number) => String(number).padStart(5, "0");
  const loadTexts = (number) => (texts.has(number) ? null : loadScript(`data/text-${padded(number)}.js`));
  async function load(number) {
    if (!chunks.has(number)) await loadScript(`data/${padded(number)}.js`);
    const records = chunks.get(number);
    chunks.delete(number);
    chunks.set(number, records);
  }
  const chunkOf = (record) => Math.floor(record / index.chunk);
  const recordAt = (record) => chunks.get(chunkOf(record))[record % index.chunk];
  const loadAll = (records) => Promise.all([...new Set(records.map(chunkOf))].map(load));

  // ------------------------------------------------------------------ filters

  function options(select, groups) {
    for (const [label, entries] of groups) {
      if (!entries.length) continue;
      const made = entries.map(([value, text, count]) => element("option", { value }, `${text} (${count.toLocaleString("en")})`));
      select.append(label ? element("optgroup", { label }, ...made) : made[0], ...(label ? [] : made.slice(1)));
    }
  }

  function fillSources() {
    const counts = { type: new Map(), source: new Map() };
    for (const row of index.rows) {
      for (const [kind, at] of [["type", TYPE], ["source", SOURCE]]) {
        for (const number of new Set(row.completions.map((completion) => completion[at]))) {
          counts[kind].set(number, (counts[kind].get(number) || 0) + 1);
        }
      }
    }
    const entries = (kind, names) => [...counts[kind]]
      .filter(([number]) => names[number])
      .map(([number, count]) => [`${kind}:${names[number]}`, names[number], count])
      .sort((a, b) => b[2] - a[2]);
    options(byId("source"), [["type", entries("type", index.types)], ["provenance", entries("source", index.sources)]]);
  }

  const refusedBy = (reason) => reason.slice(0, reason.indexOf(": "));

  function fillRefused() {
    const reasons = new Map();
    const bySource = new Map();
    const total = { any: 0, none: 0 };
    const count = (map, key) => map.set(key, (map.get(key) || 0) + 1);
    for (const row of index.rows) {
      total[row.refused.length ? "any" : "none"] += 1;
      for (const number of row.refused) count(reasons, index.reasons[number]);
      for (const source of new Set(row.refused.map((number) => refusedBy(index.reasons[number])))) count(bySource, source);
    }
    options(byId("refused"), [["", [["any", "with a refusal", total.any], ["none", "without", total.none]]]]);
    for (const [source, number] of [...bySource].sort()) {
      const own = [...reasons].filter(([reason]) => refusedBy(reason) === source).sort((a, b) => b[1] - a[1]);
      const entries = own.map(([reason, many]) => [`reason:${reason}`, reason, many]);
      options(byId("refused"), [[source, [[`source:${source}`, `${source}: any reason`, number], ...entries]]]);
    }
  }

  const isMeasured = (completion) => completion.length > BLIND;
  const measure = {
    blind: (completion) => completion[BLIND],
    seeing: (completion) => completion[SEEING],
    image: (completion) => completion[BLIND] + completion[SEEING],
  };
  const smallest = (row, value) => Math.min(...row.completions.filter(isMeasured).map(value)); // Infinity if none

  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  const within = (value, least, most) => (least === null || value >= least) && (most === null || value <= most);

  /** A predicate for rows, from the current values of the fields. */
  function passes() {
    const [kind, name] = cut(byId("source").value);
    const at = kind === "type" ? TYPE : SOURCE;
    const wanted = kind ? (kind === "type" ? index.types : index.sources).indexOf(name) : null;
    const of = byId("length-of").value;
    const [least, most] = ["min-words", "max-words"].map(number);
    const [low, high] = ["min-margin", "max-margin"].map(number);
    const unbounded = low === null && high === null;
    const [small, large] = ["min-measure", "max-measure"].map(number);
    const unmeasured = small === null && large === null;
    const measured = measure[byId("measure-of").value];
    const ofMeasure = (completion) => unmeasured || (isMeasured(completion) && within(measured(completion), small, large));
    const ofSource = (completion) => wanted === null || completion[at] === wanted;
    const ofLength = (completion) => of !== "negative" || (least === null && most === null) || (!completion[BEST] && within(completion[WORDS], least, most));
    const ofMargin = (completion) => unbounded || (completion[MARGIN] !== null && within(completion[MARGIN], low, high));
    const [refusedKind, refusedName] = cut(byId("refused").value);
    const refusal = {
      "": () => true,
      any: (row) => row.refused.length > 0,
      none: (row) => row.refused.length === 0,
      source: (row) => row.refused.some((reason) => refusedBy(index.reasons[reason]) === refusedName),
      reason: (row) => row.refused.some((reason) => index.reasons[reason] === refusedName),
    }[refusedKind];
    const anyCompletion = wanted === null && unbounded && unmeasured && (of !== "negative" || (least === null && most === null));
    const ofWhole = {
      longest: (row) => within(row.words, least, most),
      best: (row) => (least === null && most === null) || row.completions.some((completion) => completion[BEST] && within(completion[WORDS], least, most)),
      negative: () => true,
    }[of];
    return (row) =>
      refusal(row) && ofWhole(row) &&
      (anyCompletion || row.completions.some((completion) => ofSource(completion) && ofLength(completion) && ofMargin(completion) && ofMeasure(completion)));
  }
  function cut(value) {
    const at = value.indexOf(":");
    return at < 0 ? [value, ""] : [value.slice(0, at), value.slice(at + 1)];
  }

  const needle = () => byId("search").value.trim().normalize("NFC").toLowerCase();

  async function filter(firstPage = 0) {
    const mine = ++run;
    byId("records").setAttribute("aria-busy", "true");
    const pass = passes();
    let rows = [];
    index.rows.forEach((row, at) => { if (pass(row)) rows.push(at); });
    try {
      if (needle()) rows = await search(rows, needle(), mine);
    } catch (error) {
      status(error.message);
      return;
    }
    if (mine !== run) return;
    found = sorted(rows, byId("order").value);
    page = Math.max(0, Math.min(firstPage, Math.ceil(found.length / PAGE) - 1));
    current = -1;
    writeHash();
    await show();
  }

  // The first search reads the texts of all records that pass the other filters; they stay in memory.
  async function search(rows, query, mine) {
    const hits = [];
    const chunkOfText = (at) => Math.floor(at / index.textChunk);
    let shown = performance.now();
    for (let start = 0; start < rows.length && mine === run; ) {
      const chunk = chunkOfText(rows[start]);
      await loadTexts(chunk);
      const list = texts.get(chunk);
      for (; start < rows.length && chunkOfText(rows[start]) === chunk; start++) {
        if (list[rows[start] % index.textChunk].includes(query)) hits.push(rows[start]);
      }
      if (performance.now() - shown > 100) {
        shown = performance.now();
        status(`searching ... ${Math.round((100 * start) / rows.length)} %`);
        await new Promise((done) => setTimeout(done));
      }
    }
    return hits;
  }

  function sorted(rows, order) {
    const key = {
      margin: (at) => index.rows[at].margin ?? Infinity,
      words: (at) => -index.rows[at].words,
      blind: (at) => smallest(index.rows[at], (completion) => -completion[BLIND]),
      "not-blind": (at) => smallest(index.rows[at], (completion) => completion[BLIND]),
      seeing: (at) => smallest(index.rows[at], (completion) => completion[SEEING]),
    }[order];
    if (key) return rows.sort((a, b) => (key(a) === key(b) ? a - b : key(a) - key(b)));
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
    for (const [id, otherwise] of Object.entries(FIELDS)) {
      byId(id).value = values.get(id) ?? otherwise;
      if (byId(id).tagName === "SELECT" && byId(id).selectedIndex < 0) byId(id).value = otherwise;
    }
    byId("ratios").checked = values.get("ratios") === "1";
    seed = Number(values.get("seed")) || seed;
    page = Math.max(0, (Number(values.get("page")) || 1) - 1);
  }

  function writeHash() {
    const values = new URLSearchParams();
    for (const [id, otherwise] of Object.entries(FIELDS)) if (byId(id).value !== otherwise) values.set(id, byId(id).value);
    if (byId("ratios").checked) values.set("ratios", "1");
    if (byId("order").value === "random") values.set("seed", seed);
    if (page) values.set("page", page + 1);
    const hash = values.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  // ------------------------------------------------------------------ records

  const status = (text) => { byId("status").textContent = text; };

  async function show() {
    const mine = run;
    const at = page;
    const records = found.slice(page * PAGE, (page + 1) * PAGE);
    try {
      await loadAll(records);
    } catch (error) {
      status(error.message);
      return;
    }
    if (mine !== run || at !== page) return;
    byId("diff-legend").hidden = byId("ratios").checked;
    byId("ratio-legend").hidden = !byId("ratios").checked;
    byId("records").replaceChildren(...records.map((record) => (
      article(recordAt(record), record, index.rows[record].margin, byId("ratios").checked)
    )));
    byId("records").setAttribute("aria-busy", "false");
    highlight(needle());
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= last;
    const first = page * PAGE + 1;
    const all = found.length === index.rows.length ? "" : ` (filtered from ${index.rows.length.toLocaleString("en")})`;
    status(
      found.length
        ? `${first.toLocaleString("en")}\u2013${(first + records.length - 1).toLocaleString("en")} of ${found.length.toLocaleString("en")} records${all}`
        : "no records match the filters",
    );
    loadAll(found.slice((page + 1) * PAGE, (page + 2) * PAGE)).catch(() => {}); // prefetch; errors are shown when the page is opened
  }

  // ------------------------------------------------------------------ keys

  async function turn(by) {
    const next = page + by;
    if (next < 0 || next * PAGE >= found.length) return false;
    page = next;
    current = -1;
    writeHash();
    await show();
    document.querySelector("nav").scrollIntoView({ block: "start" });
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

  function ratios(on) {
    byId("ratios").checked = on && !byId("ratios").parentElement.hidden;
    writeHash();
    show();
  }

  // Sequential: with a key held down, the next step waits for the page to load.
  let moving = Promise.resolve();
  const move = (action) => { moving = moving.then(action); };

  const keys = {
    j: () => move(() => step(1)),
    k: () => move(() => step(-1)),
    n: () => move(() => turn(1)),
    p: () => move(() => turn(-1)),
    r: sample,
    f: () => byId("source").focus(),
    t: () => ratios(!byId("ratios").checked),
    s: () => { byId("statistics").open = !byId("statistics").open; },
    "/": () => byId("search").focus(),
    "?": () => byId("help").showModal(),
    Escape: () => byId("filters").reset(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || index === null) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });

  // The filter bar is sticky: scroll targets must not be covered by it.
  new ResizeObserver(() => {
    const height = getComputedStyle(byId("filters")).position === "sticky" ? byId("filters").offsetHeight : 0;
    document.documentElement.style.setProperty("--bar", `${height}px`);
  }).observe(byId("filters"));

  let pause = 0;
  byId("filters").addEventListener("input", (event) => {
    clearTimeout(pause);
    if (event.target.id === "ratios") ratios(event.target.checked);
    else pause = setTimeout(filter, event.target.id === "search" ? 150 : 0);
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(filter));
  byId("sample").addEventListener("click", sample);
  byId("keys").addEventListener("click", () => byId("help").showModal());
  byId("previous").addEventListener("click", keys.p);
  byId("next").addEventListener("click", keys.n);
  window.addEventListener("hashchange", () => { readHash(); filter(page); });
})();
