// Plots: none is drawn while its tab is hidden, and each can be saved as PNG and as CSV.
"use strict";

(() => {
  // Gradio imports Plotly with the first plot, which then sets window.Plotly.
  let plotly;
  Object.defineProperty(window, "Plotly", {
    configurable: true,
    get: () => plotly,
    set(library) {
      plotly = library;
      const { react } = library, { resize } = library.Plots;
      library.react = (place, ...figure) => new Promise((drawn) => {
        let waiting = true;
        const fit = () => {
          if (!place.clientWidth) return;
          // What the window's size changed while it was hidden, Plotly itself would not notice.
          if (!waiting) return void (Math.abs(place._fullLayout.width - place.clientWidth) > 1 && resize(place));
          waiting = false;
          drawn(react(place, ...figure));
        };
        fit();
        new ResizeObserver(fit).observe(place);
      });
      library.Plots.resize = (place) => (place.clientWidth && place._fullLayout ? resize(place) : Promise.resolve());
    },
  });

  // A cell of a CSV file; what a spreadsheet would run as a formula is quoted as in reporting/csv_export.py.
  function cell(value) {
    const text = typeof value === "string"
      ? value.replace(/^\s*[=+\-@\t\r＝＋－＠]/, "'$&").replace(/([;\t\r\n])(?=["' ]*[=+\-@＝＋－＠])/g, "$1'")
      : String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  // One row per point, as hovering shows it; a heat map has one per tile, with the value that its colour stands for.
  function csv(plot) {
    const two = plot.data.some((trace) => trace.yaxis === "y2"); // then the series says what y is
    const title = (axis) => (two && axis === "yaxis" ? "" : plot.layout[axis]?.title?.text?.replace(/^← better: |: better →$/, ""))
      || axis.slice(0, 1);
    const rows = [["series", title("xaxis"), title("yaxis"), "value"]];
    for (const trace of plot.data) {
      if (trace.hoverinfo === "skip") continue; // drawn to guide the eye
      const { name = "", x = [], y = [], customdata } = trace;
      if (trace.type === "heatmap") {
        y.forEach((down, row) => x.forEach((across, column) =>
          rows.push([name, across, down, trace.z[row][column] === null ? "" : (customdata ?? trace.z)[row][column]])));
        continue;
      }
      for (let n = 0; n < Math.max(x.length, y.length); n++) {
        if ((x[n] ?? null) === null && (y[n] ?? null) === null) continue; // an entry of the legend only
        rows.push([name, x[n], y[n], customdata?.[n]]);
      }
    }
    const used = rows[0].map((_, column) => rows.slice(1).some((row) => (row[column] ?? "") !== ""));
    return rows.map((row) => row.filter((_, column) => used[column]).map(cell).join(",")).join("\r\n") + "\r\n";
  }

  async function save(button) {
    const plot = button.closest(".picture").querySelector(".js-plotly-plot");
    if (!plot) return;
    const { savePlot: kind, title } = button.dataset;
    const filename = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
    if (kind === "png") {
      await plotly.downloadImage(plot, { format: "png", scale: 2, filename, setBackground: "opaque" });
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(plot)], { type: "text/csv" }));
    link.download = `${filename}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-save-plot]");
    if (button) save(button);
  });
})();
