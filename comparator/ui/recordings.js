// Links, history and files: copying a link, the list of what was measured before, downloads.
// It never writes a string from outside as HTML: text goes in as text.
"use strict";
Object.assign(window.qc, (() => {
  const KEY = "quant-comparator-visitor";

  // A key that only this browser knows. What it owns is listed here and nowhere else.
  function visitor() {
    let key = null;
    try {
      key = localStorage.getItem(KEY);
    } catch (_) { /* storage is off: what is made now is this page's alone */ }
    if (!/^[A-Za-z0-9_-]{22,64}$/.test(key || "")) {
      const bytes = crypto.getRandomValues(new Uint8Array(24));
      key = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      try {
        localStorage.setItem(KEY, key);
      } catch (_) { /* as above */ }
    }
    return key;
  }

  // Clicks inside an element that Gradio redraws: one listener each, asked in order.
  function on(element, table) {
    element.addEventListener("click", (event) => {
      for (const [selector, act] of table) {
        const found = event.target.closest?.(selector);
        if (found && element.contains(found)) return act(found, event);
      }
    });
  }

  async function copyText(text, button) {
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch (_) { // plain http, or a frame that may not: the old way
      const area = document.createElement("textarea");
      area.value = text;
      area.style.cssText = "position:fixed;opacity:0";
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    const before = button.dataset.label || button.textContent;
    button.dataset.label = before;
    button.textContent = done ? "Link copied" : "Copy it from here:";
    if (!done) {
      const field = document.createElement("input");
      field.value = text;
      field.readOnly = true;
      button.after(field);
      field.select();
    }
    setTimeout(() => { button.textContent = before; }, 1600);
  }

  // Share and Save. The address follows what is shown, so that reloading the page brings it back.
  function share(element, trigger) {
    on(element, [
      ["[data-copy-link]", (button) => copyText(button.dataset.copyLink, button)],
      ["[data-copy-recipe]", (button) => copyText(button.dataset.copyRecipe, button)],
      ["[data-save]", (button) => {
        button.closest("details").open = false;
        trigger("download", { ending: button.dataset.save });
      }],
    ]);
    let last = null;
    new MutationObserver(() => {
      const box = element.querySelector(".share");
      const id = box ? box.dataset.id : "";
      if (id === last || (last === null && !id)) return;
      last = id;
      try {
        const address = new URL(location.href);
        const theme = address.searchParams.get("__theme");
        const voting = id && address.searchParams.get("c") === id && address.searchParams.has("vote");
        address.search = "";
        if (id) address.searchParams.set("c", id);
        if (voting) address.searchParams.set("vote", "1"); // names stay hidden when the page is loaded again
        if (theme) address.searchParams.set("__theme", theme);
        history.replaceState(history.state, "", address);
      } catch (_) { /* a frame without an address of its own */ }
    }).observe(element, { childList: true, subtree: true, attributes: true });
    document.addEventListener("click", (event) => {
      const open = element.querySelector("details.menu[open]");
      if (open && !open.contains(event.target)) open.open = false;
    });
    element.addEventListener("keydown", (event) => {
      const open = element.querySelector("details.menu[open]");
      if (open && event.key === "Escape") {
        open.open = false;
        open.querySelector("summary").focus();
      }
    });
  }

  function recording(element, trigger) {
    on(element, [
      ["[data-again]", () => trigger("retry")],
      ["[data-history]", () => {
        const tabs = [...document.querySelectorAll('#tabs button[role="tab"]')];
        tabs.find((tab) => tab.textContent.trim() === "History")?.click();
        into("#tabs");
      }],
    ]);
  }

  function listed(element, trigger) {
    const id = (from) => from.closest("li").dataset.id;
    const ticks = () => [...element.querySelectorAll("input.tick")];
    let settled; // several boxes in quick succession are one event: Gradio may answer the last one first, or not at all
    on(element, [
      ["a.open", (link, event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
        event.preventDefault();
        trigger("select", { id: id(link) });
      }],
      ["[data-rename]", (button) => {
        const main = button.closest("li").querySelector(".history-main");
        if (main.querySelector("form")) return;
        const form = document.createElement("form"), field = document.createElement("input");
        field.value = button.dataset.rename;
        field.maxLength = 200;
        field.placeholder = "A name, or nothing";
        field.setAttribute("aria-label", "Name");
        const save = document.createElement("button");
        save.type = "submit";
        save.className = "quiet";
        save.textContent = "Save name";
        form.append(field, save);
        form.addEventListener("submit", (event) => {
          event.preventDefault();
          trigger("edit", { id: id(form), name: field.value });
        });
        field.addEventListener("keydown", (event) => { if (event.key === "Escape") form.remove(); });
        main.prepend(form);
        field.focus();
      }],
      ["[data-delete]", (button) => trigger("delete", { id: id(button) })],
      ["[data-offset]", (button) => trigger("submit", { offset: Number(button.dataset.offset) })],
      ["input.tick", () => {
        const on = ticks().filter((tick) => tick.checked), key = on[0]?.closest("li").dataset.key;
        for (const tick of ticks()) { // only those of the same prompt go with what is ticked
          const other = Boolean(key) && tick.closest("li").dataset.key !== key;
          tick.disabled = other;
          tick.title = other ? "Another prompt: its answers cannot be compared with the selected ones" : "";
        }
        clearTimeout(settled);
        settled = setTimeout(() => trigger("input", { ids: on.map(id) }), 120);
      }],
    ]);
    // Another list: nothing is ticked, whatever became of the boxes while it was redrawn.
    const listing = () => [...element.querySelectorAll("li[data-id]")].map((item) => item.dataset.id).join();
    let before = listing();
    new MutationObserver(() => {
      if (listing() === before) return;
      before = listing();
      for (const tick of ticks()) tick.checked = tick.disabled = false;
      clearTimeout(settled);
      trigger("input", { ids: [] });
    }).observe(element, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-id"] });
  }

  function said(element, trigger) {
    on(element, [["[data-undo]", (button) => trigger("undo", { id: button.dataset.undo })]]);
  }

  function download(file) {
    if (!file || !file.url) return;
    const link = document.createElement("a");
    link.href = file.url;
    link.download = file.orig_name || "";
    document.body.append(link);
    link.click();
    link.remove();
  }

  function into(selector) {
    document.querySelector(selector)?.scrollIntoView({ block: "start" });
  }

  const top = () => into("#notice");

  return { visitor, share, recording, history: listed, said, download, into, top, copyLink: copyText };
})());
