"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id), all = (css, of = document) => [...of.querySelectorAll(css)];
const slider = $("slider"), before = $("before"), root = document.documentElement;
const cards = all(".card"), last = Math.max(0, data.steps.length - 1);
const moves = [];  // of the charts' cursors
let timer = null;

// Charts: lines over optimizer steps. Factors have a logarithmic axis.
const LEFT = 46, RIGHT = 150, TOP = 12, BOTTOM = 26, LABEL = 13;
const FACTORS = [1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 20, 50, 100];
const SIGNS = {alert: "M0-7L7 5H-7Z", suspicion: "M-5 0L0-5L5 0L0 5Z", proof: "M-5-5H5V5H-5Z"};

function made(name, attributes, text, tip) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => value !== undefined && node.setAttribute(key, value));
  if (text) node.textContent = text;
  if (tip) node.append(made("title", {}, tip));
  return node;
}

function ticks(low, high) {  // about five round numbers
  if (high <= low) return [low];
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 5, 10].map((u) => u * power).find((u) => u >= 0.8 * rough);
  const first = Math.ceil(low / unit - 1e-9), count = Math.floor(high / unit + 1e-9) - first + 1;
  return Array.from({length: count}, (_, i) => +((first + i) * unit).toPrecision(12));
}

function draw(svg, {lines, values, band, marks = [], stop}, isLog) {
  const {width, height} = svg.viewBox.baseVal, right = width - RIGHT, bottom = height - BOTTOM;
  const scale = isLog ? Math.log : (value) => value, [low, high] = values.map(scale), [first, final] = data.span;
  const x = (step) => +(final > first ? LEFT + (right - LEFT) * (step - first) / (final - first) : (LEFT + right) / 2)
    .toFixed(1);
  const y = (value) => +(bottom - (bottom - TOP) * Math.min(1, (scale(value) - low) / (high - low))).toFixed(1);
  const path = (points) => points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ");
  const across = (value, style) => made("path", {class: style, d: `M${LEFT} ${y(value)}H${right}`});
  const upright = (step, style) => made("path", {class: style, d: `M${x(step)} ${TOP}V${bottom}`});
  const text = (at, what, style, anchor) => made("text", {class: style, ...at, "text-anchor": anchor}, what);
  const curve = ({points, style, probe, label}) => {
    const shape = points.length > 1 ? made("polyline", {points: path(points)})
      : made("circle", {cx: x(points[0][0]), cy: y(points[0][1]), r: 3});
    const group = made("g", {class: `line ${style}`, "data-probe": probe, tabindex: probe >= 0 ? 0 : undefined});
    group.append(shape, made("title", {}, label));
    return group;
  };
  for (const value of isLog ? FACTORS.filter((f) => f >= values[0] && f <= values[1]) : ticks(...values))
    svg.append(across(value, "grid"), text({x: LEFT - 6, y: y(value) + 4}, +value.toPrecision(6) + (isLog ? "x" : ""),
      "tick", "end"));
  for (const step of ticks(first, final)) svg.append(text({x: x(step), y: bottom + 17}, `${step}`, "tick", "middle"));
  if (band?.length) {
    const under = band.map(([step, least]) => [step, least]), over = band.map(([step, , most]) => [step, most]);
    svg.append(made("polygon", {class: "band", points: path([...over, ...under.reverse()])}));
    svg.append(curve({points: band.map((b) => [b[0], b[3]]), style: "median", label: "median of the controls"}));
  }
  const drawn = lines.filter((one) => one.points.length);
  svg.append(...drawn.map(curve).reverse());  // the worst on top
  for (const [step, value, kind, says] of marks)
    svg.append(made("path", {class: `mark ${kind}`, transform: `translate(${x(step)} ${y(value)})`, d: SIGNS[kind]},
      "", says));
  if (typeof stop === "number")
    svg.append(upright(stop, "stop"), text({x: x(stop) - 4, y: TOP + 10}, `stop, step ${stop}`, "tick stop", "end"));
  let free = TOP;  // names at the right ends, moved down where they would overlap
  drawn.slice(0, 12).map((one) => [y(one.points.at(-1)[1]), one]).sort((a, b) => a[0] - b[0]).forEach(([at, one], i, all) => {
    free = Math.max(free, Math.min(at, bottom - LABEL * (all.length - 1 - i)));
    const name = one.label.length > 23 ? `${one.label.slice(0, 11)}…${one.label.slice(-11)}` : one.label;
    svg.append(made("text", {class: `name ${one.style}`, "data-probe": one.probe, x: right + 8, y: free + 4}, name));
    free += LABEL;
  });
  const cursor = upright(first, "cursor");
  svg.append(cursor);
  moves.push((step) => cursor.setAttribute("d", `M${x(step)} ${TOP}V${bottom}`));
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    go(nearest(first + ((event.clientX - box.left) * width / box.width - LEFT) / (right - LEFT) * (final - first)));
  });
}

const show = (image, index) => {
  if (image && index >= 0) image.src = data.pool[index]; else image?.removeAttribute("src");
};
const picture = (layer, probe, i) => {
  show(layer.querySelector(".image"), probe.images[i] ?? -1);
  show(layer.querySelector(".map"), probe.maps[i] ?? -1);
};

function frames(svg, boxes) {  // two rectangles each: white on black can be seen on any picture
  svg.setAttribute("viewBox", `0 0 ${data.side} ${data.side}`);
  svg.replaceChildren(...boxes.flatMap(([left, top, right, bottom]) => ["under", ""].map((style) => {
    return made("rect", {x: left, y: top, width: right - left, height: bottom - top, class: style});
  })));
}

function render() {
  const i = Math.min(last, +slider.value), then = before.value === "" ? null : +before.value;
  const shown = new Set(all("#filter input:checked").map((box) => box.value));
  all(".stack").forEach((stack) => {
    const probe = data.probes[stack.closest("[data-probe]").dataset.probe];
    all(".now, .plain", stack).forEach((layer) => picture(layer, probe, i));
    all(".then", stack).forEach((layer) => { layer.hidden = then === null; picture(layer, probe, then ?? -1); });
    all(".boxes", stack).forEach((svg) => frames(svg, (probe.rows[i] ?? [])[3] ?? []));
  });
  cards.forEach((card, n) => {
    const row = data.probes[n].rows[i] ?? null, verdict = row ? row[0] : data.words.length - 1;
    card.querySelector(".chip").textContent = row ? data.words[verdict] : "not judged";
    card.querySelector(".effect").textContent = row ? row[1] : "";
    card.querySelector(".why").textContent = row ? row[2] : "";
    card.className = `card v-${data.styles[verdict]}`;
    card.hidden = !shown.has(data.styles[verdict]);
  });
  $("none").hidden = cards.some((card) => !card.hidden);
  [$("step"), ...all(".at")].forEach((node) => { node.textContent = data.steps[i] ?? ""; });
  slider.setAttribute("aria-valuetext", `step ${data.steps[i]}`);
  $("wipe").disabled = then === null;
  root.style.setProperty("--opacity", $("opacity").value / 100);
  root.style.setProperty("--wipe", `${$("wipe").value}%`);
  if (data.steps.length) moves.forEach((move) => move(data.steps[i]));
}

const go = (i) => { slider.value = Math.max(0, Math.min(last, i)); render(); };
const distance = (i, step) => Math.abs(data.steps[i] - step);
const nearest = (step) => data.steps.reduce((best, _, i) => distance(i, step) < distance(best, step) ? i : best, 0);

function play(on = timer === null) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (+slider.value >= last) go(0);
    timer = setInterval(() => +slider.value < last ? go(+slider.value + 1) : play(false), 700);
  }
  $("play").textContent = on ? "Pause" : "Play";
}

function light(probe, on) {
  all(`[data-probe="${probe}"]`).forEach((node) => node.classList.toggle("lit", on));
}

all(".chart").forEach((svg, i) => draw(svg, data.charts[i], i === 0));
all(".line[data-probe], .name[data-probe], .card").forEach((node) => {
  for (const [name, on] of [["mouseenter", true], ["mouseleave", false], ["focusin", true], ["focusout", false]])
    node.addEventListener(name, () => light(node.dataset.probe, on));
});
all(".line[data-probe]").forEach((node) => node.addEventListener("keydown", (event) => {
  if (event.key === "Enter") $(`probe-${node.dataset.probe}`).scrollIntoView();
}));
document.addEventListener("keydown", (event) => {
  const has_own_keys = /^(INPUT|SELECT|BUTTON|SUMMARY|A)$/.test(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey || has_own_keys) return;
  const to = {ArrowLeft: +slider.value - 1, ArrowRight: +slider.value + 1, Home: 0, End: last}[event.key];
  if (to !== undefined) go(to); else if (event.key === " ") play(); else return;
  event.preventDefault();
});
all(".bar input, .bar select").forEach((input) => input.addEventListener("input", render));
$("play").addEventListener("click", () => play());
all(".generations img").forEach((image) => show(image, +image.dataset.pool));

render();
