// From five columns on the cards are a horizontal strip: pin one, collapse, move by drag and by keys.
// What was chosen is kept by label in this tab's session storage. It stands on the slots around the cards, which the
// server never draws, so streaming and a redrawn card leave it alone.
"use strict";
Object.assign(window.qc, (() => {
  const KEY = "quant-comparator-columns", STRIP_FROM = 5;
  const CONTROLS = "input, textarea, select, dialog, [contenteditable]";
  let strip, bar;
  let state = { pinned: null, collapsed: [], order: [] };

  function restore() {
    try {
      const saved = JSON.parse(sessionStorage.getItem(KEY)) || {};
      const texts = (list) => (Array.isArray(list) ? list : []).filter((item) => typeof item === "string");
      state = { pinned: saved.pinned ?? null, collapsed: texts(saved.collapsed), order: texts(saved.order) };
    } catch (_) { /* storage is off: kept until the page is closed */ }
  }

  function keep() {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(state));
    } catch (_) { /* as above */ }
  }

  const labelOf = (slot) => slot.querySelector(".card")?.getAttribute("aria-label") ?? "";
  const used = () => [...strip.children].filter((slot) => slot.matches(".slot") && slot.querySelector(".card"));
  const byOrder = (a, b) => Number(a.style.order || 0) - Number(b.style.order || 0);
  const shown = () => used().sort(byOrder);

  // A label grows while a run goes on ("gptq" → "gptq:4bit,g64"): what was chosen for it goes along.
  function rename(slots) {
    const base = (label) => label.split(/[:\s]/)[0], labels = slots.map(labelOf);
    for (const slot of slots) {
      const before = slot.dataset.label, now = labelOf(slot);
      if (before && before !== now && base(before) === base(now) && !labels.includes(before)) {
        const change = (label) => (label === before ? now : label);
        state = { pinned: change(state.pinned), collapsed: state.collapsed.map(change), order: state.order.map(change) };
      }
      slot.dataset.label = now;
    }
  }

  function tools(slot) {
    const button = (name, words) => Object.assign(document.createElement("button"),
      { type: "button", className: `column-${name}`, textContent: words });
    const box = document.createElement("div");
    box.className = "column-tools";
    box.setAttribute("role", "group");
    const drag = button("drag", "⠿"), pin = button("pin", "Pin"), fold = button("fold", "");
    drag.title = "Drag to move this column; with the keyboard Alt + ← or →";
    pin.title = "Keep this column at the left while the others scroll";
    box.append(drag, pin, fold);
    slot.prepend(box);
    pin.addEventListener("click", () => toggle(slot, "pin"));
    fold.addEventListener("click", () => toggle(slot, "fold"));
    drag.addEventListener("pointerdown", (event) => dragged(slot, drag, event));
    return box;
  }

  function toggle(slot, what) {
    const label = labelOf(slot), folded = state.collapsed.includes(label), pinned = state.pinned === label;
    const others = state.collapsed.filter((item) => item !== label);
    if (what === "pin") Object.assign(state, { pinned: pinned ? null : label, collapsed: others });
    else Object.assign(state, { pinned: pinned && !folded ? null : state.pinned, collapsed: folded ? others : [...others, label] });
    if (what === "pin" && !pinned) strip.scrollTo({ left: 0, behavior: "instant" });
    say(what === "pin" ? `${label} ${pinned ? "unpinned" : "pinned at the left"}` : `${label} ${folded ? "expanded" : "collapsed"}`);
    lay();
  }

  // Puts the slots into order; columns that no order names stay after their left neighbour of the run.
  function lay() {
    const slots = used(), many = slots.length >= STRIP_FROM;
    strip.toggleAttribute("data-strip", many);
    bar?.toggleAttribute("data-shown", many);
    rename(slots);
    const place = (slot) => state.order.indexOf(slot.dataset.label);
    const sorted = [];
    for (const slot of slots.filter((s) => place(s) >= 0).sort((a, b) => place(a) - place(b))) sorted.push(slot);
    slots.forEach((slot, at) => {
      if (place(slot) < 0) sorted.splice(at ? sorted.indexOf(slots[at - 1]) + 1 : 0, 0, slot);
    });
    const pinned = slots.find((slot) => many && slot.dataset.label === state.pinned);
    strip.toggleAttribute("data-pinned", Boolean(pinned));
    const all = pinned ? [pinned, ...sorted.filter((slot) => slot !== pinned)] : sorted;
    all.forEach((slot, at) => mark(slot, many, at, all.length, slot === pinned));
    if (many && !all.some((slot) => slot.tabIndex === 0)) all[0].tabIndex = 0;
    keep();
  }

  function mark(slot, many, at, of, pinned) {
    const label = slot.dataset.label, folded = many && state.collapsed.includes(label);
    slot.style.order = many ? String(at) : "";
    slot.toggleAttribute("data-pinned", pinned);
    slot.toggleAttribute("data-collapsed", folded);
    if (!many) {
      for (const name of ["role", "aria-label", "tabindex"]) slot.removeAttribute(name);
      return;
    }
    const box = slot.querySelector(":scope > .column-tools") ?? tools(slot);
    box.setAttribute("aria-label", `Arrange ${label}`);
    const [drag, pin, fold] = box.children;
    drag.setAttribute("aria-label", `Move ${label}`);
    pin.setAttribute("aria-label", `Pin ${label}`);
    pin.setAttribute("aria-pressed", String(pinned));
    pin.textContent = pinned ? "Pinned" : "Pin";
    fold.setAttribute("aria-label", `Collapse ${label}`);
    fold.setAttribute("aria-pressed", String(folded));
    fold.textContent = folded ? "»" : "«";
    fold.title = folded ? "Expand this column" : "Collapse this column to its name";
    slot.setAttribute("role", "group");
    slot.setAttribute("aria-label", `${label}, column ${at + 1} of ${of}${pinned ? ", pinned" : ""}${folded ? ", collapsed" : ""}`);
    if (!slot.hasAttribute("tabindex")) slot.tabIndex = -1;
  }

  function say(text) {
    const line = bar?.querySelector("[role=status]");
    if (line) line.textContent = text;
  }

  // Moves a column by `step` places among those that are not pinned. Returns whether it moved.
  function move(slot, step) {
    const all = shown().filter((other) => !other.hasAttribute("data-pinned"));
    const from = all.indexOf(slot), to = from + step;
    if (from < 0 || to < 0 || to >= all.length) return false;
    all.splice(to, 0, ...all.splice(from, 1));
    state.order = [...(state.pinned ? [state.pinned] : []), ...all.map((other) => other.dataset.label)];
    lay();
    say(slot.getAttribute("aria-label"));
    return true;
  }

  // Follows the pointer: a column that passes the middle of its neighbour changes places with it.
  function dragged(slot, handle, event) {
    if (event.button || slot.hasAttribute("data-pinned")) return;
    handle.setPointerCapture(event.pointerId);
    strip.toggleAttribute("data-dragging", true);
    slot.toggleAttribute("data-dragged", true);
    const middle = (other) => { const box = other.getBoundingClientRect(); return box.left + box.width / 2; };
    const follow = ({ clientX: x }) => {
      const all = shown().filter((other) => !other.hasAttribute("data-pinned")), at = all.indexOf(slot);
      if (at + 1 < all.length && x > middle(all[at + 1])) move(slot, 1);
      else if (at > 0 && x < middle(all[at - 1])) move(slot, -1);
      const box = strip.getBoundingClientRect();
      if (x > box.right - 40) strip.scrollLeft += 24;
      if (x < box.left + 40) strip.scrollLeft -= 24;
    };
    const end = () => {
      handle.removeEventListener("pointermove", follow);
      strip.removeAttribute("data-dragging");
      slot.removeAttribute("data-dragged");
    };
    handle.addEventListener("pointermove", follow);
    handle.addEventListener("lostpointercapture", end, { once: true });
  }

  function focus(slot) {
    for (const other of used()) other.tabIndex = other === slot ? 0 : -1;
    slot.focus({ preventScroll: true });
    if (slot.style.order === "0") strip.scrollLeft = 0; // a pinned one is always in view, its neighbours are not
    slot.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function keys(event) {
    const slot = event.target.closest?.("#cards > .slot");
    if (!slot || !strip.hasAttribute("data-strip") || event.target.closest(CONTROLS)) return;
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.altKey) {
      if (!step) return;
      event.preventDefault(); // else the browser goes back a page
      if (move(slot, step)) slot.scrollIntoView({ block: "nearest", inline: "nearest" });
      return;
    }
    const all = shown(), at = all.indexOf(slot), inText = event.target.closest(".answer");
    const to = step ? at + step : inText ? -1 : { Home: 0, End: all.length - 1 }[event.key] ?? -1;
    if (to === -1 && !step) return;
    event.preventDefault();
    if (all[to]) focus(all[to]);
  }

  // Called once, with the element of the line above the cards.
  function columns(element) {
    bar = element;
    strip = document.querySelector("#cards");
    restore();
    element.addEventListener("click", (event) => {
      if (event.target.closest("[data-expand]")) state.collapsed = [];
      else if (event.target.closest("[data-reset]")) state = { pinned: null, collapsed: [], order: [] };
      else return;
      lay();
      say(event.target.closest("[data-reset]") ? "The columns are in their original order" : "All columns are expanded");
    });
    strip.addEventListener("keydown", keys);
    let before = "";
    new MutationObserver(() => {
      const labels = JSON.stringify(used().map(labelOf));
      if (labels !== before) lay();
      before = labels;
    }).observe(strip, { childList: true, subtree: true, attributes: true, attributeFilter: ["aria-label"] });
    lay();
  }

  return { columns };
})());
