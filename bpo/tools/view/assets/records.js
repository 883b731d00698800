// Renders the records of `bpo view`. Texts of the data set are only inserted as text nodes.
"use strict";
const bpoRecords = (() => {
  const LONG_WORDS = 400;

  // Invisible and bidirectional control characters are shown by name.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
  const visible = (text) => String(text).replace(UNSEEN, (character) => {
    const code = character.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });

  function element(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value !== false && value !== null) node.setAttribute(key, value === true ? "" : visible(value));
    }
    node.append(...children.map((child) => (child instanceof Node ? child : visible(child)))); // text nodes
    return node;
  }
  const bdi = (text) => element("bdi", {}, text);

  function article(record, at, margin, coloured) {
    const title = element("h2", {}, bdi(record.id), element("small", {}, `record ${(at + 1).toLocaleString("en")}`));
    if (margin !== null) title.append(element("small", { class: margin < 0 ? "wrong" : null }, `margin ${signed(margin)} nats`));
    const body = element("div", { class: "texts" });
    if (record.note) body.append(element("p", { class: "problem" }, record.note));
    for (const turn of record.prompt) body.append(element("p", { class: "prompt", dir: "auto" }, element("b", {}, turn.role), ` ${turn.text}`));
    for (const completion of record.completions) body.append(completionBlock(completion, coloured));
    for (const refused of record.refused) body.append(refusedBlock(refused));
    return element("article", { tabindex: "-1", "aria-label": record.id }, title, pictures(record), body);
  }

  const signed = (value) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(2)}`;

  function pictures(record) {
    const box = element("div", { class: "pictures" });
    for (const image of record.images) {
      if (image.path) box.append(figure(image.path, bdi(image.name), "the image"));
      else box.append(element("p", { class: "problem" }, image.error || `not shown: ${image.name}`));
    }
    for (const [at, weak] of Object.entries(record.weakened)) {
      const completion = record.completions[at];
      const step = completion.provenance.noise_step === undefined ? "" : `, t = ${completion.provenance.noise_step}`;
      for (const path of weak.paths) {
        const caption = element("span", {}, `weakened for ${completion.type}${step}`);
        if (weak.note) caption.append(" ", element("abbr", { title: weak.note, tabindex: "0" }, "approximately"));
        box.append(figure(path, caption, "the weakened image"));
      }
    }
    return box;
  }

  function figure(path, caption, alt) {
    const picture = element("img", { src: path, alt, loading: "lazy", decoding: "async" });
    return element("figure", {}, picture, element("figcaption", {}, caption));
  }

  function block(kind, type, facts, provenance, words, content, tells = []) {
    const head = element("header", {}, element("span", { class: "type" }, bdi(type)), element("span", { class: "facts" }, facts.join(" \u00b7 ")));
    const long = words > LONG_WORDS;
    const text = element("p", { class: `text${long ? " long" : ""}`, dir: "auto", tabindex: long ? "0" : null }, ...content);
    const origin = provenance.length ? [element("p", { class: "facts" }, ...provenance.flatMap((part, at) => (at ? [" \u00b7 ", part] : [part])))] : [];
    const apart = tells.length ? [element("p", { class: "facts" }, "text alone tells: ", ...tells)] : [];
    return element("section", { class: `completion ${kind}` }, head, text, ...apart, ...origin);
  }

  function completionBlock(completion, coloured) {
    const facts = [`score ${completion.score}`, `${completion.words.toLocaleString("en")} words`];
    if (completion.log_ratio !== undefined) facts.push(`log-ratio ${signed(completion.log_ratio)}`);
    if (completion.margin !== null) facts.push(`margin ${signed(completion.margin)}`);
    if (completion.blind !== undefined) facts.push(`blind ${signed(completion.blind)}`, `seeing ${signed(completion.seeing)}`);
    const provenance = completion.source ? [completion.source] : [];
    for (const [name, value] of Object.entries(completion.provenance)) {
      const shown = `${name.replaceAll("_", " ")} ${value}`;
      provenance.push(name === "donor" ? element("a", { href: `#search=${encodeURIComponent(value)}` }, shown) : shown);
    }
    const content = coloured && completion.tokens ? tokens(completion.tokens) : segments(completion.segments);
    return block(completion.best ? "best" : "", completion.type, facts, provenance, completion.words, content, (completion.telling || []).map(telling));
  }

  // An n-gram that tells the answers of this type apart, with the pairs in which only one side has it.
  function telling([ngram, preferred, rejected]) {
    const side = preferred > rejected ? "preferred" : "rejected";
    return element("span", { class: "telling", title: `preferred answers ${preferred}, rejected answers ${rejected}` }, bdi(ngram), ` ${side} ${Math.max(preferred, rejected)} : ${Math.min(preferred, rejected)}`);
  }

  function refusedBlock(refused) {
    const words = refused.segments.reduce((sum, [, text]) => sum + text.split(" ").length, 0);
    const facts = [refused.reason, ...(refused.detail ? [refused.detail] : [])];
    return block("refused", `refused: ${refused.source}`, facts, [], words, segments(refused.segments));
  }

  function segments(list) {
    const nodes = [];
    let change = null;
    for (const [op, text, object] of list) {
      const inner = object ? element("mark", { title: `object: ${object}` }, text) : visible(text);
      if (op === "x") {
        change = element("span", { class: "change" }, element("del", {}, inner), element("i", { class: "arrow" }, "\u2192"));
        nodes.push(change);
      } else if (op === "~" && change) {
        if (change.lastChild.tagName !== "INS") change.append(element("ins", {}));
        change.lastChild.append(inner);
      } else {
        change = null;
        const last = nodes[nodes.length - 1];
        if (op === "+" && last && last.tagName === "INS") last.append(inner);
        else if (op === "=") nodes.push(inner);
        else nodes.push(element(op === "-" ? "del" : "ins", {}, inner));
      }
    }
    return nodes;
  }

  function tokens(list) {
    return list.map(([text, ratio]) => {
      const size = Math.min(1, Math.abs(ratio) / 2);
      const kind = size < 0.05 ? "" : ratio > 0 ? " more" : " less";
      const node = element("span", { class: `token${kind}${size > 0.6 ? " strong" : ""}`, title: `${signed(ratio)} nats` }, text);
      node.style.setProperty("--strength", `${Math.round(100 * size)}%`);
      return node;
    });
  }

  // Highlights search matches, if the browser supports it. A phrase may span the segments of a diff; dropped words are
  // not part of the text.
  function highlight(query) {
    if (!window.Highlight || !CSS.highlights) return;
    const ranges = [];
    for (const block of query ? document.querySelectorAll(".text, .prompt, article h2 bdi, figcaption bdi") : []) {
      const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
      const parts = [];
      let length = 0;
      while (walker.nextNode()) {
        const node = walker.currentNode;
        if (node.parentElement.closest("del, .arrow")) continue;
        parts.push({ node, start: length });
        length += node.length;
      }
      const whole = parts.map((part) => part.node.data).join("").toLowerCase();
      for (let at = whole.indexOf(query); at >= 0; at = whole.indexOf(query, at + query.length)) {
        for (const { node, start } of parts) {
          const [first, last] = [Math.max(0, at - start), Math.min(node.length, at + query.length - start)];
          if (first >= last) continue;
          const range = document.createRange();
          range.setStart(node, first);
          range.setEnd(node, last);
          ranges.push(range);
        }
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  return { element, article, highlight };
})();
