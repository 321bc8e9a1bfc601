// Draws the figures of a tutorial from plotly's data, in the place of the pictures that stand there.
addEventListener("DOMContentLoaded", () => {
  if (!window.Plotly || innerWidth < 600) return; // the pictures stay: on a phone numbers would not fit into cells
  for (const figure of document.querySelectorAll("figure.plot")) {
    const { data, layout } = JSON.parse(figure.dataset.figure);
    const place = document.createElement("div");
    figure.querySelector("img").replaceWith(place);
    Plotly.newPlot(place, data, layout, { responsive: true, displayModeBar: false });
  }
});
