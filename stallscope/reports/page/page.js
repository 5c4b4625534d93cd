"use strict";
// Draws the figures of the page in the colours of its light or dark style, again whenever those or the width change.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const probe = document.createElement("i");
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = `var(${name})`; // as it is on a light or dark page
    return getComputedStyle(probe).color;
  };

  const styled = (layout) => {
    const text = colour("--text"), dim = colour("--dim"), grid = colour("--grid"), raised = colour("--raised");
    const narrow = window.innerWidth < 640;
    const shared = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: dim, size: narrow ? 11 : 12.5, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 58, r: layout.yaxis2 && layout.yaxis2.side ? 52 : 14, t: 26, b: narrow ? 90 : 64 },
      legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: { color: text } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: dim, activecolor: text },
      hoverlabel: { bgcolor: raised, bordercolor: dim, font: { color: text }, align: "left", namelength: -1 },
      dragmode: narrow ? false : "zoom",
    };
    const drawn = { ...layout, ...shared };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      drawn[name] = {
        gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, ...layout[name],
        title: { standoff: 8, ...(layout[name].title || {}) },
      };
    }
    return drawn;
  };

  const draw = () => {
    for (const [name, figure] of Object.entries(figures)) {
      Plotly.react(name, figure.data, styled(structuredClone(figure.layout)), {
        displaylogo: false, responsive: true, doubleClick: "reset",
        modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "sendChartToCloud"],
      });
    }
  };

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  window.matchMedia("(max-width: 640px)").addEventListener("change", draw);
})();
