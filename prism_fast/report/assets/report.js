"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll("[data-figure]")];

  // Colours of axes and text follow the page, which follows the reader's light or dark setting.
  function themed(layout, small) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
      tickfont: { color: colour("--soft"), size: small ? 11 : 12 }, automargin: true,
    };
    const merged = {
      margin: small ? { l: 40, r: 8, t: 26, b: 28 } : { l: 50, r: 12, t: 34, b: 36 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("--soft"), size: small ? 11 : 13 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: small ? 11 : 13 }, bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      hovermode: small ? "x unified" : "closest",
      ...layout,
    };
    if (!layout.showlegend) merged.margin = { ...merged.margin, t: 8 };
    merged.xaxis = { ...axis, showgrid: !small, ...layout.xaxis };
    merged.yaxis = { ...axis, ...layout.yaxis };
    if (layout.xaxis?.title) merged.xaxis.title = { ...layout.xaxis.title, standoff: 8, font: { size: 12 } };
    if (merged.xaxis.zerolinewidth) merged.xaxis.zerolinecolor = colour("--soft");
    return merged;
  }

  function draw() {
    for (const node of plots) {
      const figure = figures[node.dataset.figure];
      const small = node.closest(".grid") !== null;
      Plotly.react(node, figure.data, themed(figure.layout, small), { responsive: true, displaylogo: false, displayModeBar: false });
    }
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const groups = [...document.querySelectorAll(".group")];
  const buttons = [...document.querySelectorAll("#picker button")];
  function show(index) {
    groups.forEach((group, position) => { group.hidden = position !== index; });
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.group) === index)));
  }
  buttons.forEach((button) => button.addEventListener("click", () => show(Number(button.dataset.group))));
  if (groups.length > 0) show(groups.length - 1);
})();
