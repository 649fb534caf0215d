for (const place of document.querySelectorAll(".plot > div")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  Plotly.newPlot(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
}
