// The Votes tab. While a ballot is open, what names the answers is hidden (votes.css); keys act only while the focus is in it.
"use strict";
Object.assign(window.qc, (() => {
  const KEYS = { 1: "left", 2: "right", 3: "tie", 4: "bad", ArrowLeft: "left", ArrowRight: "right" };

  // A link for voters: names are hidden from the first moment on. Gradio draws a tab only once it is open.
  let wanted = new URLSearchParams(location.search).has("vote");
  if (wanted && document.body) openForVoters();
  else if (wanted) document.addEventListener("DOMContentLoaded", openForVoters);

  function openForVoters() {
    document.body.classList.add("voting");
    const open = () => {
      if (!document.querySelector("#tabs [role=tab]")) return;
      waiting.disconnect();
      qc.openTab("Votes");
    };
    const waiting = new MutationObserver(open);
    waiting.observe(document.body, { childList: true, subtree: true });
    open();
  }

  function ballot(element, trigger) {
    let acted = false;
    const send = (data) => { acted = true; trigger("submit", data); };

    element.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button?.dataset.choice) send({ choice: button.dataset.choice });
      else if (button?.dataset.act) send({ act: button.dataset.act });
      else if (button?.dataset.voteLink) {
        const link = new URL(location.href);
        link.search = "";
        link.searchParams.set("c", button.dataset.voteLink);
        link.searchParams.set("vote", "1");
        qc.copyLink(link.href, button);
      }
    });
    element.addEventListener("keydown", (event) => {
      const open = element.querySelector("[data-choice]");
      if (!open || !KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      send({ choice: KEYS[event.key] });
    });
    // Whatever begins a run ends the voting: its answers have their names.
    document.addEventListener("click", (event) => {
      if (event.target.closest?.("#run")) document.body.classList.remove("voting");
    });
    const drawn = () => {
      const section = element.querySelector("[data-voting]"), begin = element.querySelector('[data-act="start"]');
      if (wanted && (section || element.querySelector(".ballot-start"))) {
        wanted = false;
        if (begin) return begin.click();
      }
      document.body.classList.toggle("voting", Boolean(section) || wanted);
      if (!acted) return;
      acted = false;
      (element.querySelector("[data-focus]") ?? begin)?.focus({ preventScroll: true });
      section?.scrollIntoView({ block: "nearest" });
    };
    drawn();
    new MutationObserver(drawn).observe(element, { childList: true, subtree: true, characterData: true });
  }

  return { ballot };
})());
