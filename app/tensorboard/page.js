// Draws what `plugin.py` hands out: a line per run, then charts. Nothing is smoothed, and an axis holds all that was
// measured. A run has its colour where a chart has a few curves of several runs, a curve has its own everywhere else.
const COLOURS = ["#2563eb", "#d9480f", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#846358", "#e8a200", "#5f3dc4", "#66a80f"];
const DASHES = ["", "6 3", "2 3", "9 3 2 3"];
const WIDTH = 330, HEIGHT = 170, LEFT = 44, RIGHT = 12, TOP = 8, BOTTOM = 22;
const RELOAD = 30000;  // milliseconds
const MOST_IN_LEGEND = 6;
const STYLE = `
  body { margin: 0; padding: 12px 18px 40px; color: #1d2129; background: #fff; font: 14px/1.4 system-ui, sans-serif; }
  h2 { font-size: 16px; margin: 22px 0 8px; }
  table { border-collapse: collapse; width: 100%; }
  th { text-align: left; font-weight: 500; color: #667080; padding: 3px 14px 3px 0; border-bottom: 1px solid #d9dee6; }
  td { padding: 4px 14px 4px 0; border-bottom: 1px solid #eef0f3; vertical-align: top; font-variant-numeric: tabular-nums; }
  td.best { font-weight: 700; }
  .swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px -1px 2px; }
  .fine { color: #1b7f3b; } .look { color: #b3261e; } .soft { color: #667080; }
  .bar { margin: 12px 0 0; color: #667080; } .bar input { vertical-align: middle; width: 220px; }
  .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 14px; }
  figure { margin: 0; padding: 8px 10px; border: 1px solid #e3e7ed; border-radius: 8px; position: relative; min-width: 0; }
  figure h3 { font-size: 14px; margin: 0; display: flex; justify-content: space-between; gap: 8px; }
  figure p { margin: 0 0 2px; color: #667080; font-size: 12px; min-height: 17px; }
  svg { display: block; width: 100%; height: auto; }
  svg text { font: 11px system-ui, sans-serif; fill: #667080; }
  svg .reference { font-style: italic; paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round; }
  .legend { font-size: 12px; display: flex; flex-wrap: wrap; gap: 0 14px; }
  .legend svg { display: inline-block; width: 22px; height: 8px; vertical-align: middle; margin-right: 4px; }
  summary { font-size: 12px; color: #667080; cursor: pointer; }
  .tip { position: absolute; pointer-events: none; background: #fff; border: 1px solid #98a2b3; border-radius: 6px; padding: 4px 8px;
    font-size: 12px; z-index: 2; white-space: nowrap; }`;

let content = { runs: [], groups: [] };
let from = 0;  // first step that is drawn
const hidden = new Set();  // names of runs

export async function render() {
  if (settle()) return;
  document.head.append(element("style", {}, STYLE));
  await load();
  setInterval(load, RELOAD);
}

// TensorBoard's own tabs smooth, and cut outliers off, unless its settings say otherwise; it reads them when it is opened.
function settle() {
  if (localStorage.getItem("superbolt")) return false;
  const key = "_tb_global_settings", settings = JSON.parse(localStorage.getItem(key) ?? "{}");
  localStorage.setItem(key, JSON.stringify({ scalarSmoothing: 0, ignoreOutliers: false, ...settings }));
  localStorage.setItem("_ignoreYOutliers", "false");
  localStorage.setItem("superbolt", "settled");
  window.top.location.reload();
  return true;
}

async function load() {
  const answer = await fetch("content");
  if (answer.ok) content = await answer.json();
  draw();
}

function draw() {
  const place = window.scrollY, open = new Set([...document.querySelectorAll("details[open]")].map(one => one.id));
  const groups = content.groups.map(group => {
    const charts = group.charts.map(visible).filter(chart => chart.series.length).map(chart => figure(chart, open));
    return charts.length ? [element("h2", {}, group.title), element("div", { class: "charts" }, ...charts)] : [];
  });
  const nothing = element("p", {}, "No run has written anything yet. This page looks again every half minute.");
  document.body.replaceChildren(...(content.runs.length ? [table(), slider(), ...groups.flat()] : [nothing]));
  window.scrollTo(0, place);
}

function visible(chart) {
  return { ...chart, series: chart.series.filter(one => !hidden.has(one.run)) };
}

// ---------------------------------------------------------------------------------------------------- the runs

function table() {
  const columns = ["run", "step", "held-out bits per byte", "gzip -9", "held-out loss", "training loss", "tokens/s", "newest point", "worth a look"];
  const best = Math.min(...content.runs.map(run => run.bits_per_byte ?? Infinity));
  const lines = content.runs.map((run, number) => {
    const box = element("input", { type: "checkbox" });
    box.checked = !hidden.has(run.name);
    box.onchange = () => { if (!hidden.delete(run.name)) hidden.add(run.name); draw(); };
    const health = run.troubles.length ? run.troubles.map(line => element("div", { class: "look" }, line)) : [element("span", { class: "fine" }, "nothing: healthy")];
    return element("tr", {},
      element("td", {}, element("label", {}, box, swatch(number), run.name)),
      element("td", {}, run.step.toLocaleString("en")),
      element("td", { class: content.runs.length > 1 && run.bits_per_byte === best ? "best" : "" }, told(run.bits_per_byte)),
      ...["gzip", "validation_loss", "training_loss", "tokens_per_second"].map(key => element("td", {}, told(run[key]))),
      element("td", {}, ago(run.seconds)), element("td", {}, ...health));
  });
  return element("table", {}, element("tr", {}, ...columns.map(name => element("th", {}, name))), ...lines);
}

function swatch(number) {
  return element("span", { class: "swatch", style: `background:${colour(number)}` });
}

function slider() {
  const last = Math.max(...content.runs.map(run => run.step));
  const input = element("input", { type: "range", min: 0, max: Math.max(0, last - 1), value: from });
  const label = element("span", {}, ` from step ${from.toLocaleString("en")}`);
  input.oninput = () => { label.textContent = ` from step ${Number(input.value).toLocaleString("en")}`; };
  input.onchange = () => { from = Number(input.value); draw(); };
  return element("div", { class: "bar" }, "Charts show all steps; for the end alone draw: ", input, label);
}

// ---------------------------------------------------------------------------------------------------- a chart

function figure(chart, open) {
  const series = styled(chart.series);
  const scale = scales(chart, series);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": chart.title });
  svg.append(...axes(scale, chart.share), ...series.flatMap(one => line(one, scale)), ...references(chart, scale));
  const newest = series.length === 1 ? element("span", {}, told(end(series[0]), chart.share)) : "";
  const made = element("figure", {}, element("h3", {}, element("span", {}, chart.title), newest), element("p", {}, chart.note), svg, legend(chart, series, open));
  watch(made, svg, chart, series, scale);
  return made;
}

function styled(all) {
  const names = [...new Set(all.map(one => one.curve))], runs = [...new Set(all.map(one => one.run))];
  const byRun = runs.length > 1 && names.length <= 3;
  return all.map(one => {
    const curve = names.indexOf(one.curve), run = content.runs.findIndex(other => other.name === one.run);
    const label = [runs.length > 1 ? one.run : "", names.length > 1 ? one.curve : ""].filter(Boolean).join(" ");
    return { ...one, label: label || one.curve, colour: colour(byRun ? run : names.length > 1 ? curve : run), dash: DASHES[(byRun ? curve : runs.indexOf(one.run)) % DASHES.length],
      points: one.points.filter(([step]) => step >= from) };
  });
}

function scales(chart, series) {
  const points = series.flatMap(one => one.points).filter(([, value]) => value !== null);
  const ys = [...points.map(([, value]) => value), ...chart.axis, ...chart.references.map(one => one.value)];
  const [low, high] = ys.length ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.05, steps = points.map(([step]) => step);
  const [first, last] = [Math.min(from, ...steps), Math.max(from + 1, ...steps)];
  const bottom = low - room, height = high - low + 2 * room;
  return { first, last, bottom, top: bottom + height,
    x: step => LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT),
    y: value => HEIGHT - BOTTOM - (value - bottom) / height * (HEIGHT - TOP - BOTTOM) };
}

function axes(scale, share) {
  const grid = { stroke: "#eceff3" }, right = WIDTH - RIGHT, foot = HEIGHT - BOTTOM;
  const rows = ticks(scale.bottom, scale.top, 4).flatMap(value => [
    shape("line", { x1: LEFT, x2: right, y1: scale.y(value), y2: scale.y(value), ...grid }),
    shape("text", { x: LEFT - 5, y: scale.y(value) + 4, "text-anchor": "end" }, told(value, share))]);
  const columns = ticks(scale.first, scale.last, 5).filter(Number.isInteger).flatMap(step => [
    shape("line", { x1: scale.x(step), x2: scale.x(step), y1: TOP, y2: foot, ...grid }),
    shape("text", { x: scale.x(step), y: HEIGHT - 7, "text-anchor": "middle" }, told(step))]);
  return [...rows, ...columns];
}

function references(chart, scale) {
  return chart.references.flatMap(({ name, value }) => {
    const y = scale.y(value);
    return [shape("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, stroke: "#868e96", "stroke-dasharray": "3 4" }),
      shape("text", { x: LEFT + 4, y: y < TOP + 12 ? y + 12 : y - 4, class: "reference" }, `${name}: ${told(value, chart.share)}`)];
  });
}

function line(one, scale) {
  const known = one.points.map(([step, value]) => value === null ? null : [scale.x(step), scale.y(value)]);
  let path = "";
  known.forEach((point, number) => { if (point) path += `${number && known[number - 1] ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`; });
  const dots = known.filter(Boolean).length <= 12 ? known.filter(Boolean) : [];
  return [shape("path", { d: path, fill: "none", stroke: one.colour, "stroke-width": 1.6, "stroke-dasharray": one.dash, "stroke-linejoin": "round" }),
    ...dots.map(([x, y]) => shape("circle", { cx: x, cy: y, r: 2.4, fill: one.colour }))];
}

function legend(chart, series, open) {
  if (series.length === 1) return "";
  const entries = series.map(one => {
    const sample = shape("svg", { viewBox: "0 0 22 8" });
    sample.append(shape("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: one.colour, "stroke-width": 2.4, "stroke-dasharray": one.dash }));
    return element("span", {}, sample, `${one.label} `, element("b", {}, told(end(one), chart.share)));
  });
  const all = element("div", { class: "legend" }, ...entries);
  if (entries.length <= MOST_IN_LEGEND) return all;
  const more = element("details", { id: chart.title }, element("summary", {}, `${entries.length} curves, newest values`), all);
  more.open = open.has(chart.title);
  return more;
}

function watch(made, svg, chart, series, scale) {
  const guide = shape("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "#98a2b3", visibility: "hidden" });
  const tip = element("div", { class: "tip", style: "display:none" });
  svg.append(guide);
  made.append(tip);
  svg.onmouseleave = () => { guide.setAttribute("visibility", "hidden"); tip.style.display = "none"; };
  svg.onmousemove = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * WIDTH;
    const near = series.map(one => [one, nearest(one.points, scale, x)]).filter(([, point]) => point);
    if (!near.length) return;
    const [step] = near.map(([, point]) => point).reduce((a, b) => Math.abs(scale.x(a[0]) - x) <= Math.abs(scale.x(b[0]) - x) ? a : b);
    const lines = near.sort((a, b) => b[1][1] - a[1][1]).slice(0, MOST_IN_LEGEND).map(([one, point]) =>
      element("div", {}, element("span", { class: "swatch", style: `background:${one.colour}` }), `${one.label} ${told(point[1], chart.share)}${point[0] === step ? "" : ` (step ${point[0]})`}`));
    tip.replaceChildren(element("b", {}, `step ${step.toLocaleString("en")}`), ...lines);
    tip.style.display = "";
    const left = event.clientX - made.getBoundingClientRect().left;
    Object.assign(tip.style, left > box.width / 2 ? { right: `${made.clientWidth - left + 14}px`, left: "auto" } : { left: `${left + 14}px`, right: "auto" }, { top: "60px" });
    guide.setAttribute("x1", scale.x(step));
    guide.setAttribute("x2", scale.x(step));
    guide.setAttribute("visibility", "visible");
  };
}

function nearest(points, scale, x) {
  const known = points.filter(([, value]) => value !== null);
  return known.length ? known.reduce((a, b) => Math.abs(scale.x(a[0]) - x) <= Math.abs(scale.x(b[0]) - x) ? a : b) : null;
}

// ---------------------------------------------------------------------------------------------------- small things

function colour(number) {
  return COLOURS[number] ?? `hsl(${(number * 137.5) % 360} 60% ${number % 2 ? 38 : 52}%)`;
}

function end(one) {
  return one.points.length ? one.points[one.points.length - 1][1] : null;
}

function told(value, share) {
  if (value === null || value === undefined) return "–";
  if (share) return `${Number((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value), digits = size < 10 ? 4 : 3;
  for (const [factor, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= factor) return Number((value / factor).toPrecision(3)) + letter;
  }
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough * 0.999);
  const found = [];
  for (let number = Math.ceil(low / step); number * step <= high; number++) found.push(Number((number * step).toPrecision(12)));
  return found;
}

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.append(...children);
  return made;
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.append(...children);
  return made;
}
