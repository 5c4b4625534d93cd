"use strict";
// What only a browser can do: links within tables, saving charts and tables, light and dark.

// The address changes without the page being loaded anew, as Dash's own links do it. Where one was on a page is kept as
// what stood there, as the page grows again when one comes back.
const goTo = (href) => {
  window.history.replaceState(whatStandsHere(), "");
  window.history.pushState({}, "", href);
  window.dispatchEvent(new CustomEvent("_dashprivate_pushstate"));
  window.scrollTo(0, 0);
};
const whatStandsHere = () => {
  const place = [...document.querySelectorAll("[data-part]")].find((one) => one.getBoundingClientRect().bottom > 0);
  return place && window.scrollY > 0 ? { part: place.dataset.part, top: place.getBoundingClientRect().top } : {};
};
const standAgain = (part, top, looks) => {
  const place = document.querySelector(`[data-part="${CSS.escape(part)}"]`);
  if (place) window.scrollBy(0, place.getBoundingClientRect().top - top);
  if (looks) setTimeout(standAgain, 150, part, top, looks - 1);
};
window.history.scrollRestoration = "manual";
window.addEventListener("popstate", ({ state }) => state?.part && setTimeout(standAgain, 60, state.part, state.top, 8));

window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {};
window.dashAgGridComponentFunctions.StallscopeLink = (props) => {
  const cell = (props.data || {})[props.colDef.field] || {};
  return React.createElement("a", { href: cell.href }, cell.text);
};

// HTML that came escaped from the server.
window.stallscope_dash = {
  Markup: ({ id, html, className, style }) =>
    React.createElement("div", { id, className, style, dangerouslySetInnerHTML: { __html: html } }),
};

// A part is drawn when its place comes into sight (of a long page, most never do), and again whenever the address or the
// data have changed; not any more when its page is being left.
let shown = null;
const inSight = new WeakSet();
const show = (place) => {
  if (!shown || place.closest("[data-page]")?.dataset.page !== window.location.pathname) return;
  window.dash_clientside.set_props({ type: "seen", name: place.dataset.part }, { data: shown });
};
const sight = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    sight.unobserve(target);
    inSight.add(target);
    show(target);
  }
}, { rootMargin: "250px" });
const watched = new WeakSet();
new MutationObserver(() => {
  for (const place of document.querySelectorAll("[data-part]")) {
    if (watched.has(place)) continue;
    watched.add(place);
    if (place.dataset.at === "once") {
      inSight.add(place);
      show(place);
    } else {
      sight.observe(place);
    }
  }
}).observe(document, { childList: true, subtree: true });

// A server that is gone is said, and one that was started anew is looked at anew.
const asks = window.fetch.bind(window);
window.fetch = async (...asked) => {
  try {
    const answer = await asks(...asked);
    document.body.classList.remove("gone");
    return answer;
  } catch (error) {
    document.body.classList.add("gone");
    throw error;
  }
};
// Dash keeps every change, each tick of its clock, too, for an undo that is not offered.
setInterval(() => {
  for (const store of window.dash_stores || []) store.getState().history.past.length = 0;
}, 60_000);
const run = (version) => (version || "").split(" ")[0];

// Plotly is started when a page has asked for its parts, of which words then come first. A chart that is left while it is
// being drawn is cleared away when that is over: Plotly would trip over what is gone.
let plotly = null;
const startPlotly = () => {
  plotly ??= new Promise((resolve) => {
    const script = document.createElement("script");
    script.src = "/plotly.js";
    script.onerror = resolve; // then Dash tries its own
    script.onload = () => {
      const { purge } = Plotly;
      Plotly.purge = (chart) => setTimeout(purge, 1000, chart);
      resolve();
    };
    document.head.append(script);
  });
  return plotly;
};

// ``open``: the page of a path. ``show``: what is in sight is drawn anew. ``make``: what takes long to make is made with
// what was drawn for it, and is told of what is drawn later. ``zoomed``: what a chart was zoomed to by hand, of all that
// it tells.
window.dash_clientside = Object.assign({}, window.dash_clientside, {
  stallscope: {
    open: (path, pages) => {
      for (const link of document.querySelectorAll("#nav a")) {
        if (link.pathname === path) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
      return pages[path] || pages[""];
    },
    show: (search, version) => {
      if (shown && run(shown.version) && run(version) !== run(shown.version)) window.location.reload();
      shown = { search: search || "", version };
      for (const link of document.querySelectorAll("#nav a")) link.search = shown.search;
      [...document.querySelectorAll("[data-part]")].filter((place) => inSight.has(place)).forEach(show);
      setTimeout(startPlotly, 20);
      return shown;
    },
    make: async (drawn, { made, prop }, there) => {
      const { no_update, set_props } = window.dash_clientside;
      if (!drawn) return no_update;
      if (there) {
        set_props(made.props.id, { [prop]: drawn });
        return no_update;
      }
      await startPlotly();
      return { ...made, props: { ...made.props, [prop]: drawn } };
    },
    zoomed: () => {
      const { callback_context: { triggered }, no_update } = window.dash_clientside;
      const zooms = triggered.map(({ value }) => value || {}).filter((told) => told["xaxis.autorange"] || "xaxis.range[0]" in told);
      return zooms.length ? zooms[0] : no_update;
    },
  },
});

// What is kept says what it is of: the recording, and of an incident's page its number.
const about = () => {
  const incident = new URLSearchParams(window.location.search).get("incident") || "1";
  return [document.title.split(" · ")[0], ...(window.location.pathname === "/incident" ? [`incident ${incident}`] : [])];
};
const fileName = (name) => [...about(), name].join("-").replace(/[^\w.-]+/g, "_");
const shownAs = (button) => [button.closest(".card").querySelector("h2").textContent, ...about()].join(" · ");

document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (link && link.origin === window.location.origin && !link.download && !link.getAttribute("href").startsWith("#")
      && !(event.ctrlKey || event.metaKey || event.shiftKey || event.defaultPrevented)) {
    event.preventDefault();
    goTo(link.href);
    return;
  }
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.save) {
    const chart = button.closest(".card").querySelector(".js-plotly-plot");
    if (chart) {
      const { width, height } = chart.getBoundingClientRect();
      const title = { text: shownAs(button).replace(/[<&]/g, " "), font: { size: 14 }, x: 0, xref: "paper", y: 1, yref: "container", yanchor: "top", pad: { t: 8 } };
      const margin = { ...chart.layout.margin, t: (chart.layout.margin?.t || 0) + 24 };
      const picture = { data: chart.data, layout: { ...chart.layout, title, margin, height: height + 24 } };
      Plotly.downloadImage(picture, { format: button.dataset.save, filename: fileName(button.dataset.name), width, height: height + 24, scale: 2 });
    }
  } else if (button.dataset.csv) {
    window.dash_ag_grid.getApi(button.dataset.csv).exportDataAsCsv({ fileName: `${fileName(button.dataset.csv)}.csv` });
  } else if (button.dataset.copy) {
    navigator.clipboard.writeText(button.dataset.copy).then(() => { button.textContent = "copied"; });
  } else if (button.id === "theme") {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
      || (!document.documentElement.dataset.theme && window.matchMedia("(prefers-color-scheme: dark)").matches);
    setTheme(dark ? "light" : "dark");
  }
});

const setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  try { window.localStorage.setItem("stallscope-theme", theme); } catch { /* a browser that keeps nothing */ }
};
try {
  const kept = window.localStorage.getItem("stallscope-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch { /* the same */ }

document.addEventListener("submit", (event) => {
  const { ask } = event.target.dataset;
  if (!ask) return;
  event.preventDefault();
  const typed = event.target.elements[ask].value.trim();
  const address = new URLSearchParams(window.location.search);
  if (!typed) return;
  if (ask === "request") address.set("request", typed);
  else address.set("question", `${ask}:${typed}`);
  goTo(`${ask === "request" ? "/request" : window.location.pathname}?${address}`);
});

// The keys that people know from trace viewers: w and s zoom, a and d move, / goes to the search.
const MOVES = { w: [0.25, -0.25], s: [-0.5, 0.5], a: [-0.25, -0.25], d: [0.25, 0.25] }; // of what is shown, at its ends
document.addEventListener("keydown", (event) => {
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    document.querySelector("form[data-ask=request] input").focus();
    return;
  }
  const charts = [...document.querySelectorAll("[data-part] .js-plotly-plot")];
  const chart = charts.find(({ layout }) => layout?.xaxis?.type === "date" && layout.xaxis.range);
  if (!MOVES[event.key] || !chart) return;
  const ends = chart.layout.xaxis.range.map((text) => Date.parse(`${text.slice(0, 23).replace(" ", "T")}Z`));
  const moved = ends.map((end, at) => end + MOVES[event.key][at] * (ends[1] - ends[0]));
  const [start, stop] = moved.map((time) => new Date(time).toISOString().slice(0, 23).replace("T", " "));
  if (stop > start) window.dash_clientside.set_props("moved", { data: { "xaxis.range[0]": start, "xaxis.range[1]": stop } });
});
