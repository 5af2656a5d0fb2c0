"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id), all = (css, of = document) => [...of.querySelectorAll(css)];
const slider = $("slider"), before = $("before"), root = document.documentElement;
const cards = all(".card"), last = Math.max(0, data.steps.length - 1);
let timer = null;

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
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const at = {x: left, y: top, width: right - left, height: bottom - top, class: style};
    Object.entries(at).forEach(([key, value]) => rect.setAttribute(key, value));
    return rect;
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
    card.querySelector(".p").textContent = row ? row[2] : "";
    card.className = `card v-${data.styles[verdict]}`;
    card.hidden = !shown.has(data.styles[verdict]);
  });
  $("none").hidden = cards.some((card) => !card.hidden);
  [$("step"), ...all(".at")].forEach((node) => { node.textContent = data.steps[i] ?? ""; });
  slider.setAttribute("aria-valuetext", `step ${data.steps[i]}`);
  $("wipe").disabled = then === null;
  root.style.setProperty("--opacity", $("opacity").value / 100);
  root.style.setProperty("--wipe", `${$("wipe").value}%`);
  all(".chart").forEach((chart) => {  // the cursor, at the same step in every chart
    const [x0, x1] = chart.dataset.x.split(",").map(Number), [s0, s1] = chart.dataset.steps.split(",").map(Number);
    const x = s1 > s0 ? x0 + (x1 - x0) * (data.steps[i] - s0) / (s1 - s0) : (x0 + x1) / 2;
    const cursor = chart.querySelector("path.cursor");
    if (!cursor || !Number.isFinite(x)) return;
    cursor.setAttribute("d", cursor.getAttribute("d").replace(/^M[\d.-]+/, `M${x.toFixed(1)}`));
  });
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

all(".timeline").forEach((chart) => chart.addEventListener("click", (event) => {
  const box = chart.getBoundingClientRect(), width = chart.viewBox.baseVal.width;
  const [x0, x1] = chart.dataset.x.split(",").map(Number), [s0, s1] = chart.dataset.steps.split(",").map(Number);
  go(nearest(s0 + ((event.clientX - box.left) * width / box.width - x0) / (x1 - x0 || 1) * (s1 - s0)));
}));
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

// A page that is renewed comes back as it was left; at the last step it goes on to the newest one.
const renew = Number(document.body.dataset.renew), kept = ["slider", "opacity", "before", "wipe"];
if (renew) {
  try {
    const saved = JSON.parse(sessionStorage.getItem("memwatch"));
    kept.forEach((id) => { if (saved && saved[id] !== undefined) $(id).value = saved[id]; });
    if (saved && saved.atEnd) slider.value = last;
    if (saved) all("#filter input").forEach((box) => { box.checked = saved.filter.includes(box.value); });
    if (saved) requestAnimationFrame(() => scrollTo(0, saved.scroll));
  } catch { /* nothing was saved */ }
  setInterval(() => {
    if (timer !== null) return;  // it plays; nobody is interrupted
    const state = Object.fromEntries(kept.map((id) => [id, $(id).value]));
    const filter = all("#filter input:checked").map((box) => box.value);
    try {
      const more = {filter, scroll: scrollY, atEnd: +slider.value === last};
      sessionStorage.setItem("memwatch", JSON.stringify({...state, ...more}));
    } catch { /* it comes back as new */ }
    location.reload();
  }, 1000 * renew);
}
render();
