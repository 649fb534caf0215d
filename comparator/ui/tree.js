// The tree of tensors in the Layers tab: groups open and close in the browser, by click and by arrow keys.
"use strict";
Object.assign(window.qc, (() => {
  function tree(element) {
    const kept = new Set(); // keys of the groups that are open without a filter; a table drawn anew takes them over
    let open = kept;
    const table = () => element.querySelector("table.tree");
    const groups = () => [...element.querySelectorAll("tr.group")];

    function show() {
      const below = new Map([["", true]]); // key of a group → whether what is below it can be seen
      for (const row of table()?.tBodies[0].rows ?? []) {
        row.hidden = !below.get(row.dataset.in);
        if (!row.matches(".group")) continue;
        below.set(row.dataset.key, !row.hidden && open.has(row.dataset.key));
        row.querySelector(".twig").setAttribute("aria-expanded", String(open.has(row.dataset.key)));
      }
    }

    function set(row, on) {
      if (on) open.add(row.dataset.key);
      else open.delete(row.dataset.key);
      show();
    }

    // Back from a list that a heading sorted to the tree.
    function unsort() {
      if (!("flat" in table().dataset)) return;
      delete table().dataset.flat;
      for (const heading of table().querySelectorAll("[aria-sort]")) heading.removeAttribute("aria-sort");
      const body = table().tBodies[0];
      body.append(...[...body.rows].sort((a, b) => a.dataset.at - b.dataset.at));
    }

    element.addEventListener("click", (event) => {
      const twig = event.target.closest(".twig"), all = event.target.closest("[data-tree]");
      if (twig) return set(twig.closest("tr"), twig.getAttribute("aria-expanded") === "false");
      if (!all) return;
      unsort();
      for (const row of groups()) open[all.dataset.tree === "all" ? "add" : "delete"](row.dataset.key);
      show();
    });

    // As in a tree: up and down go to another group, right opens, left closes or goes to the group around it.
    element.addEventListener("keydown", (event) => {
      const twig = event.target.closest(".twig");
      if (!twig || event.altKey || event.ctrlKey || event.metaKey) return;
      const row = twig.closest("tr"), seen = groups().filter((other) => !other.hidden), at = seen.indexOf(row);
      const expanded = twig.getAttribute("aria-expanded") === "true";
      const outer = seen.find((other) => other.dataset.key === row.dataset.in);
      const to = { ArrowDown: seen[at + 1], ArrowUp: seen[at - 1], Home: seen[0], End: seen.at(-1),
        ArrowLeft: expanded ? null : outer }[event.key];
      if (event.key === "ArrowRight" && !expanded) set(row, true);
      else if (event.key === "ArrowLeft" && expanded) set(row, false);
      else if (to) to.querySelector(".twig").focus();
      else return;
      event.preventDefault();
    });

    // A filtered table comes open; one without a filter as the visitor left it.
    new MutationObserver(() => {
      if (!table() || table().dataset.drawn) return;
      table().dataset.drawn = "1";
      open = table().matches(".open") ? new Set(groups().map((row) => row.dataset.key)) : kept;
      show();
    }).observe(element, { childList: true, subtree: true });
  }

  return { tree };
})());
