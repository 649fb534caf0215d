// The page's own small script: copying, sorting, folding, and the list of variants.
// It never writes a string from outside as HTML: text goes in as text.
"use strict";
window.qc = (() => {
  const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442",
    "#004c77", "#8e3f00", "#00694d", "#88506f", "#996a00", "#396e9b", "#a09810"]; // plots.py has the same
  const NEUTRAL = "#7d8490";

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in element && typeof value !== "string") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch (_) { // no clipboard API: the page came over plain http from another machine
      const area = make("textarea", { style: "position:fixed;opacity:0" });
      area.value = text;
      (button.closest("dialog") || document.body).append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const before = button.dataset.label || button.textContent;
    button.dataset.label = before;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1400);
  }

  // A tab by its name; where the window is narrow it may stand in the menu behind the three dots.
  function openTab(name) {
    const named = (selector) => [...document.querySelectorAll(selector)].find((tab) => tab.textContent.trim() === name);
    (named('#tabs button[role="tab"]') ?? named("#tabs .overflow-dropdown button"))?.click();
    document.querySelector("#tabs")?.scrollIntoView({ block: "start" });
  }

  // “Compare now”: the form is filled in; run it, unless the line says that something stands in the way. The list of
  // columns is laid out anew by the server whenever variants or adapters change: wait until it has them all.
  function compareNow(tries = 100) {
    if (tries === 100) document.querySelector("#notice")?.scrollIntoView({ block: "start" });
    if (document.querySelector("#notice .bad")) return;
    const ticked = (selector) => document.querySelectorAll(`${selector} input[type=checkbox]:checked`).length;
    const whole = ticked("#columns") === ticked("#variants") * ticked("#adapters") && ticked("#columns") > 1;
    if (whole) document.querySelector("#run")?.click();
    else if (tries) setTimeout(() => compareNow(tries - 1), 50);
  }

  const tsv = (table) => [...table.rows].filter((row) => !row.matches(".group")) // sums over what is below them
    .map((row) => [...row.cells].map((cell) => (cell.dataset.copy ?? cell.innerText).trim().replace(/\s+/g, " ")).join("\t"))
    .join("\n");

  function sort(button) {
    const heading = button.closest("th"), table = heading.closest("table"), column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    if (table.matches(".tree")) table.dataset.flat = ""; // sorted, the tensors are one list
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const cell = row.cells[column], keyed = cell.querySelector("[data-key]");
      if (keyed) return Number(keyed.dataset.key);
      return cell.innerText.trim();
    };
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      const missing = (v) => v === "" || v === "–";
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const both = typeof x === "number" && typeof y === "number";
      const way = both ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return down ? -way : way;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }

  // What was clicked decides; one listener for the whole page, so that cards may be redrawn at will.
  document.addEventListener("click", (event) => {
    const on = (selector) => event.target.closest?.(selector);
    let button;
    if ((button = on("[data-copy-answer]"))) {
      copy(button.closest(".card").querySelector(".answer .text")?.textContent ?? "", button);
    } else if ((button = on("[data-copy-details]"))) {
      copy(button.nextElementSibling.textContent, button);
    } else if ((button = on("[data-copy-code]"))) {
      copy(button.closest("dialog").querySelector("pre").textContent, button);
    } else if ((button = on("[data-copy-table]"))) {
      copy(tsv(button.closest(".table").querySelector("table")), button);
    } else if ((button = on("[data-sort]"))) {
      sort(button);
    } else if ((button = on("[data-sheet]"))) {
      button.nextElementSibling.showModal();
    } else if ((button = on("[data-close]"))) {
      button.closest("dialog").close();
    } else if (event.target.matches?.("dialog.sheet")) {
      event.target.close(); // a click beside it
    } else if ((button = on("[data-run]"))) {
      document.querySelector("#run")?.click();
    } else if ((button = on("[data-untick]"))) {
      document.dispatchEvent(new CustomEvent("qc-untick", { detail: button.dataset.untick }));
    } else if ((button = on("[data-tab]"))) {
      openTab(button.dataset.tab);
    } else if ((button = on("#panel-toggle"))) {
      const open = document.body.classList.toggle("panel-open");
      button.setAttribute("aria-expanded", String(open));
    }
  });

  // What a heading means, for who reaches it with the keyboard; the pointer gets it from `title`.
  document.addEventListener("focusin", ({ target }) => {
    document.querySelector("#definition")?.remove();
    const words = target.matches?.("[data-sort]:focus-visible") && target.querySelector(".why")?.title;
    if (!words) return;
    const { left, bottom } = target.getBoundingClientRect();
    const place = `left:${Math.max(8, Math.min(left, innerWidth - 328))}px;top:${bottom + 6}px`;
    document.querySelector(".gradio-container").append(make("div", { id: "definition", role: "tooltip", style: place }, words));
    target.setAttribute("aria-describedby", "definition");
  });
  for (const event of ["focusout", "scroll"]) {
    document.addEventListener(event, () => document.querySelector("#definition")?.remove(), true);
  }

  // A card: passes Unload on to the server, and keeps the end of a streaming answer in view unless one scrolled up.
  function card(element, trigger, release) {
    element.addEventListener("click", (event) => {
      const button = event.target.closest("[data-release]");
      if (!button) return;
      button.disabled = true;
      button.textContent = "Unloading …";
      trigger(release);
    });
    let follows = true, wrote = false;
    element.addEventListener("scroll", (event) => {
      const box = event.target;
      if (box.classList?.contains("answer") && box.closest(".generating")) follows = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    }, true);
    new MutationObserver(() => {
      const box = element.querySelector(".card .answer");
      if (box?.closest(".queued, .loading")) follows = true; // a new run
      if (!box || !follows) return;
      const writing = box.closest(".card").classList.contains("generating");
      if (writing) box.scrollTop = box.scrollHeight;
      else if (wrote) box.scrollTop = 0; // done: all columns are read from their beginning
      wrote = writing;
    }).observe(element, { childList: true, subtree: true, characterData: true });
  }

  // The list of variants. Its value is plain data; see components/variants.py.
  const SEARCHED = 12;  // rows of the list from which on it can be searched

  const SIZE = "Memory once loaded, estimated from the headers of the model's files.";
  const SPEED = "Decoding one sequence compared with bf16, as measured on similar hardware (docs/benchmarks.md). Run to measure it on this machine.";

  let held = {};  // memory once loaded, by notation

  function sizes(byNotation) {
    held = byNotation || {};
    for (const row of document.querySelectorAll("#variants .pick")) {
      const place = row.querySelector(".size");
      if (place) place.textContent = held[row.dataset.notation] || "";
    }
  }

  function picker(element, props, watch) {
    const list = element.querySelector(".picker");
    const search = make("input", { type: "search", class: "pick-search", placeholder: "Find a variant",
      "aria-label": "Find a variant" });
    search.addEventListener("input", () => find());
    let drawn = "";

    const value = () => props.value;
    const reference = (v) => {
      if (v.reference !== "auto" && v.on.includes(v.reference)) return v.reference;
      const ticked = v.rows.filter((r) => v.on.includes(r.notation));
      return ticked.length ? ticked.reduce((a, b) => (b.precision > a.precision ? b : a)).notation : null;
    };
    const change = (part) => { props.value = { ...value(), ...part }; show(); };
    const tick = (notation, on) => {
      const v = value();
      const wanted = v.rows.map((r) => r.notation).filter((n) => (n === notation ? on : v.on.includes(n)));
      change({ on: wanted, reference: v.reference === notation && !on ? "auto" : v.reference });
    };

    function draw(v) {
      const parts = v.rows.length > SEARCHED ? [search] : [];
      if ((v.questions || []).length) parts.unshift(make("div", { class: "questions" }, ...v.questions.map(question)));
      let group = "";
      for (const r of v.rows) {
        if (r.group && r.group !== group) parts.push(make("h3", { class: "pick-group" }, (group = r.group)));
        parts.push(line(r));
      }
      list.replaceChildren(...parts);
      drawn = JSON.stringify(v.rows);
      find();
    }

    // A button that selects the variants of a usual question, and no other.
    function question(q) {
      const button = make("button", { type: "button", class: "quiet", title: q.title }, q.words);
      button.addEventListener("click", () => {
        search.value = "";
        change({ on: value().rows.map((r) => r.notation).filter((n) => q.on.includes(n)), reference: "auto" });
        find();
      });
      return button;
    }

    function line(r) {
      const box = make("input", { type: "checkbox", value: r.notation });
      box.addEventListener("change", () => tick(r.notation, box.checked));
      const radio = make("input", { type: "radio", name: "qc-reference", value: r.notation,
        "aria-label": `${r.notation} is the reference` });
      radio.addEventListener("change", () => change({ reference: r.notation }));
      const words = make("span", { class: "title" }, r.why || r.title);
      const label = make("label", { title: r.why || r.title }, box, make("span", { class: "swatch", "aria-hidden": "true" }),
        make("span", { class: "what" }, make("code", { class: "notation" }, r.notation), words),
        ...(r.speed && !r.why ? [make("span", { class: "speed", title: SPEED }, r.speed)] : []),
        ...(r.why ? [] : [make("span", { class: "speed size", title: SIZE }, held[r.notation] || "")]));
      const row = make("div", { class: "pick", "data-notation": r.notation }, label, radio);
      if (r.why) { row.classList.add("unavailable"); box.disabled = true; }
      if (r.custom) {
        const away = make("button", { type: "button", class: "quiet", "aria-label": `Remove ${r.notation}` }, "×");
        away.addEventListener("click", () => {
          const now = value();
          change({ rows: now.rows.filter((x) => x.notation !== r.notation), on: now.on.filter((n) => n !== r.notation) });
        });
        row.insertBefore(away, radio);
      }
      return row;
    }

    // Headings without a row below them go too; a selected row always stays.
    function find() {
      const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
      let heading = null, below = 0;
      const close = () => { if (heading) heading.hidden = !below; };
      for (const item of list.children) {
        if (item.matches(".pick-group")) { close(); heading = item; below = 0; continue; }
        if (!item.matches(".pick")) continue;
        const text = item.textContent.toLowerCase();
        item.hidden = !item.classList.contains("on") && !words.every((w) => text.includes(w));
        below += !item.hidden;
      }
      close();
    }

    function show() {
      const v = value();
      if (!v || !Array.isArray(v.rows)) return;
      if (JSON.stringify(v.rows) !== drawn) draw(v);
      const chosen = reference(v);
      let next = 0;
      for (const row of list.querySelectorAll(".pick")) {
        const name = row.dataset.notation, on = v.on.includes(name);
        const colour = !on ? "transparent" : name === chosen ? NEUTRAL : PALETTE[next++ % PALETTE.length];
        row.querySelector("input[type=checkbox]").checked = on;
        const radio = row.querySelector("input[type=radio]");
        radio.checked = name === chosen;
        radio.disabled = !on;
        row.style.setProperty("--c", colour);
        row.classList.toggle("on", on);
      }
      const note = document.querySelector("#panel-toggle .chosen");
      if (note) note.textContent = v.on.join(", ");
    }

    document.addEventListener("qc-untick", (event) => tick(event.detail, false));
    watch("value", show);
    show();
  }

  return { card, picker, sizes, compareNow, openTab };
})();
