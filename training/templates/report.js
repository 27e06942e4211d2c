"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  document.documentElement.classList.add("scripted");

  // Numbers come as base64 of little-endian arrays.
  const views = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
  const read = (packed) => {
    const text = atob(packed.data), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const values = new views[packed.type](bytes.buffer);
    if (packed.high === undefined) return values;
    const step = (packed.high - packed.low) / 65534;  // see pack_scaled
    return Float64Array.from(values, (x) => (x === 65535 ? NaN : packed.low + x * step));
  };
  const unpack = (thing) => {
    if (thing === null || typeof thing !== "object") return thing;
    if (thing.type && typeof thing.data === "string") return read(thing);
    for (const key of Object.keys(thing)) thing[key] = unpack(thing[key]);
    return thing;
  };
  unpack(data);

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const percent = (x) => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %";
  const times = (x) => (x >= 0.995 || x === 0 ? "×" + x.toFixed(x < 9.95 ? 2 : 0) : "÷" + (1 / x).toFixed(1 / x < 9.95 ? 2 : 0));
  const swatch = (expert) => element("span", { className: `swatch e${expert}` });

  // ------------------------------------------------------------------ tooltip

  const tip = $("tip");
  const showTip = (event, ...content) => {
    tip.replaceChildren(...content);
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), edge = 12;
    const left = Math.min(event.clientX + 14, innerWidth - box.width - edge);
    const below = event.clientY + 18 + box.height < innerHeight;
    tip.style.left = Math.max(edge, left) + "px";
    tip.style.top = Math.max(edge, below ? event.clientY + 18 : event.clientY - box.height - 14) + "px";
  };
  const hideTip = () => { tip.hidden = true; };
  addEventListener("scroll", hideTip, { passive: true });

  // ------------------------------------------------------------------ colours and maps

  let colors = {};
  const readColors = () => {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ink", "soft", "card", "none", "less", "more", "accent"]) colors[name] = style.getPropertyValue("--" + name).trim();
  };
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const mix = (from, to, share) => {
    const a = channels(from), b = channels(to);
    return `rgb(${a.map((x, i) => Math.round(x + (b[i] - x) * share)).join(",")})`;
  };
  const diverging = (ratio) => {  // of a ratio: blue below 1, orange above, full at a factor of 4
    const strength = ratio > 0 ? Math.max(-1, Math.min(1, Math.log2(ratio) / 2)) : -1;
    return mix(colors.none, strength < 0 ? colors.less : colors.more, Math.abs(strength));
  };
  const signed = (x) => mix(colors.none, x < 0 ? colors.less : colors.more, Math.min(1, Math.abs(x)));

  // A map of rows × columns; cell(i, j) gives {color, text, tip: [strings]} or null for an empty one.
  const drawMap = (id, rows, columns, rowNames, columnNames, cell, label) => {
    const canvas = $(id), square = columnNames === null;
    if (!canvas) return;
    const pen = canvas.getContext("2d"), font = "11px system-ui, sans-serif";
    pen.font = font;
    const left = Math.min(150, 10 + Math.max(...rowNames.map((name) => pen.measureText(name).width)));
    const room = canvas.parentElement.clientWidth || 640;
    const width = Math.max(columns > 64 ? 5 : 9, Math.min(58, (room - left - 2) / columns));
    const height = square ? Math.min(width, 44) : Math.max(17, Math.min(26, 520 / rows));
    const top = 18, scale = devicePixelRatio || 1;
    const whole = [left + columns * width + 2, top + rows * height + 2];
    canvas.width = whole[0] * scale; canvas.height = whole[1] * scale;
    canvas.style.width = whole[0] + "px"; canvas.style.height = whole[1] + "px";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    pen.scale(scale, scale);
    pen.font = font;
    pen.textBaseline = "middle";
    const fit = (name) => { while (name.length > 2 && pen.measureText(name).width > left - 8) name = name.slice(0, -2) + "…"; return name; };
    const gap = width > 14 ? 1.5 : width > 8 ? 0.75 : 0;
    const every = Math.ceil(18 / width), everyRow = Math.ceil(12 / height);
    const cells = [];
    for (let i = 0; i < rows; i++) {
      pen.fillStyle = colors.soft; pen.textAlign = "right";
      if (i % everyRow === 0) pen.fillText(fit(rowNames[i]), left - 6, top + (i + 0.5) * height);
      for (let j = 0; j < columns; j++) {
        const found = cell(i, j);
        cells.push(found);
        if (!found) continue;
        pen.fillStyle = found.color;
        pen.fillRect(left + j * width, top + i * height, width - gap, height - gap);
        if (found.text && width >= 34 && height >= 16) {
          const [r, g, b] = found.color[0] === "#" ? channels(found.color) : found.color.match(/\d+/g).map(Number);
          pen.fillStyle = 0.3 * r + 0.59 * g + 0.11 * b > 140 ? "#1b1c1f" : "#ffffff";
          pen.textAlign = "center";
          pen.fillText(found.text, left + (j + 0.5) * width - gap / 2, top + (i + 0.5) * height);
        }
      }
    }
    pen.fillStyle = colors.soft; pen.textAlign = "center";
    for (let j = 0; j < columns; j += every) pen.fillText((square ? rowNames : columnNames)[j], left + (j + 0.5) * width - gap / 2, top - 9);
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const j = Math.floor((event.clientX - box.left - left) / width), i = Math.floor((event.clientY - box.top - top) / height);
      const found = i >= 0 && j >= 0 && i < rows && j < columns ? cells[i * columns + j] : null;
      if (!found) return hideTip();
      showTip(event, element("b", { textContent: found.tip[0] }), ...found.tip.slice(1).map((line) => element("div", { textContent: line })));
    };
    canvas.onpointermove = canvas.onclick = point;
    canvas.onpointerleave = hideTip;
  };
  const numbers = (count) => Array.from({ length: count }, (_, i) => String(i));

  // ------------------------------------------------------------------ state

  let row = 0, isolated = null, similarity = "cosine";
  const text = data.text, shown = text ? text.shown : 0;
  const tokens = [...document.querySelectorAll("#tokens i")];
  const traits = tokens.map((token) => [...token.classList].filter((name) => name === "w" || name === "s").join(" "));
  const slots = text ? text.slots : 0;
  const slot = (layer, token, k) => (layer * shown + token) * slots + k;

  const paint = () => {
    if (!text) return;
    const experts = data.num_experts[row];
    for (let t = 0; t < tokens.length; t++) {
      const first = text.ids[slot(row, t, 0)], names = [first < experts ? "e" + first : "ex"];
      if (traits[t]) names.push(traits[t]);
      if (isolated !== null) {
        for (let k = 0; k < slots; k++) if (text.ids[slot(row, t, k)] === isolated) names.push(k ? "has" : "has first");
      }
      tokens[t].className = names.join(" ");
      tokens[t].dataset.e = first < experts ? first : "–";
    }
    $("tokens").classList.toggle("isolated", isolated !== null);
  };

  const legend = () => {
    if (!text) return;
    const experts = data.num_experts[row], firsts = new Array(experts).fill(0);
    for (let t = 0; t < shown; t++) if (text.ids[slot(row, t, 0)] < experts) firsts[text.ids[slot(row, t, 0)]]++;
    $("legend").replaceChildren(...firsts.map((count, expert) => {
      const button = element("button", { title: `first choice of ${count} of ${shown} tokens shown` }, swatch(expert), `expert ${expert}`,
        element("span", { className: "soft", textContent: percent(count / Math.max(1, shown)) }));
      button.setAttribute("aria-pressed", String(isolated === expert));
      button.onclick = () => { isolated = isolated === expert ? null : expert; legend(); paint(); };
      return button;
    }));
  };

  const describe = (event, t) => {
    const experts = data.num_experts[row], list = [];
    for (let k = 0; k < slots; k++) {
      const expert = text.ids[slot(row, t, k)];
      if (expert >= experts) continue;
      const weight = text.weights[slot(row, t, k)] / 255 * text.weight_scale[row];
      const bar = element("span", { className: `bar e${expert}` });
      bar.style.width = Math.max(2, 100 * weight / text.weight_scale[row]) + "%";
      list.push(element("div", { className: "row" }, swatch(expert), `expert ${expert}`, element("span", {}, bar), weight.toFixed(2)));
    }
    const more = text.more ? text.more[row * shown + t] : 0;
    if (more) list.push(element("div", { className: "soft", textContent: `and ${more} more` }));
    if (!list.length) list.push(element("div", { textContent: "no expert: dropped" }));
    showTip(event, element("b", { textContent: text.names[text.name_of[t]] }),
      element("div", { className: "soft", textContent: `token ${text.position[t] + 1} of its sequence, id ${text.token_ids[t]}` }), ...list);
  };
  if (text) {
    tokens.forEach((token, t) => { token.t = t; });
    const over = (event) => (event.target.t === undefined ? hideTip() : describe(event, event.target.t));
    $("tokens").addEventListener("pointerover", over);
    $("tokens").addEventListener("click", over);
    $("tokens").addEventListener("pointerleave", hideTip);
    $("numbers").onclick = (event) => {
      const on = $("tokens").classList.toggle("numbered");
      event.currentTarget.setAttribute("aria-pressed", String(on));
    };
  }

  // ------------------------------------------------------------------ what each expert likes

  const kindMaps = () => {
    if (!text) return;
    const experts = data.num_experts[row], chosen = text.chosen[row];
    for (const [name, kind] of Object.entries(text.kinds)) {
      const counts = kind.counts[row];
      drawMap("kind-" + name, kind.labels.length, experts, kind.labels, numbers(experts), (i, j) => {
        const expected = kind.occurrences[i] * chosen[j] / text.total, count = counts[i * experts + j];
        if (!expected) return null;
        const lift = count / expected;
        return { color: expected < 3 ? colors.none : diverging(lift), text: expected < 3 ? "" : times(lift), tip: [
          `${kind.labels[i]} → expert ${j}`, `${count} of ${kind.occurrences[i]} tokens; ${expected.toFixed(1)} expected`,
          expected < 3 ? "too few to say" : times(lift)] };
      }, `${name} by expert, in times of the expert's share`);
    }
  };

  const cards = () => {
    if (!text) return;
    const chosen = text.chosen[row];
    $("cards").replaceChildren(...text.liked[row].map((liked, expert) => {
      const rows = liked.map(([name, count, occurrences, lift]) => element("tr", {},
        element("td", {}, element("code", { textContent: text.names[name] })), element("td", { textContent: `${count} of ${occurrences}` }),
        element("td", { textContent: times(lift) })));
      const body = rows.length ? element("table", {}, ...rows) : element("p", { className: "soft", textContent: "No token clearly above its share." });
      return element("div", { className: `card e${expert}` },
        element("h4", {}, `Expert ${expert} `, element("small", { textContent: `${percent(chosen[expert] / text.total)} of tokens` })), body);
    }));
  };

  // ------------------------------------------------------------------ load, similarity, pairs

  const loadMap = () => {
    const load = data.load;
    if (!load) return;
    const experts = Math.max(...load.num_experts);
    drawMap("load-map", load.layers.length, experts, load.layers.map((layer) => "layer " + layer), numbers(experts), (i, j) => {
      if (j >= load.num_experts[i]) return null;
      const counts = load.counts[i], total = counts.reduce((a, b) => a + b, 0), ratio = counts[j] * load.num_experts[i] / Math.max(1, total);
      return { color: counts[j] ? diverging(ratio) : colors.none, text: counts[j] ? times(ratio) : "×",
        tip: [`layer ${load.layers[i]}, expert ${j}`, `${counts[j]} of ${total} assignments`, `${times(ratio)} of a fair share`] };
    }, "load of every expert in every layer, in times of a fair share");
  };

  const pair = (experts, i, j) => { if (i > j) [i, j] = [j, i]; return i * experts - i * (i + 1) / 2 + j - i - 1; };
  const nearest = (map) => map.rows.reduce((best, value) => (Math.abs(value - row) < Math.abs(best - row) ? value : best));
  const standIn = (at) => (at === row ? "" : ` Shown for layer ${data.layers[at]}, the nearest that this page holds; report.json has all.`);

  const similarityMap = () => {
    const map = data.similarity;
    if (!map) return;
    const at = nearest(map), place = map.rows.indexOf(at), experts = data.num_experts[at];
    const values = map[similarity][place], distances = map.distance[place], low = similarity === "cosine" ? map.low : -1;
    const color = (x) => (similarity === "cosine" ? mix(colors.none, colors.accent, (x - low) / Math.max(1e-9, 1 - low)) : signed(x));
    $("similarity-said").textContent = map.said[place] + standIn(at);
    $("similarity-low").textContent = similarity === "cosine" ? map.low.toFixed(2) : "−1";
    $("similarity-high").textContent = "1";
    $("similarity-scale").style.background = similarity === "cosine" ? `linear-gradient(to right,${color(low)},${color(1)})`
      : `linear-gradient(to right,${color(-1)},${color(0)},${color(1)})`;
    drawMap("similarity-map", experts, experts, numbers(experts), null, (i, j) => {
      if (i === j) return { color: colors.card, text: "", tip: [`expert ${i}`] };
      const value = values[pair(experts, i, j)];
      if (Number.isNaN(value)) return { color: colors.none, text: "", tip: [`experts ${i} and ${j}`, "identical: no direction"] };
      return { color: color(value), text: value.toFixed(2), tip: [`experts ${i} and ${j}`, `cosine ${value.toFixed(4)}`,
        `differ by ${(100 * distances[pair(experts, i, j)]).toPrecision(3)} % of their norm`] };
    }, "cosine similarity of the experts' weights");
  };

  const pairsMap = () => {
    const map = data.pairs;
    if (!map) return;
    const at = nearest(map), place = map.rows.indexOf(at), experts = data.num_experts[at];
    $("pairs-said").textContent = standIn(at);
    drawMap("pairs-map", experts, experts, numbers(experts), null, (i, j) => {
      if (i === j) return { color: colors.card, text: "", tip: [`expert ${i}`] };
      const observed = map.observed[place][pair(experts, i, j)], expected = map.expected[place][pair(experts, i, j)];
      const few = !(expected >= 3) && observed < 3, ratio = observed / expected;
      return { color: few ? colors.none : diverging(ratio), text: few ? "" : times(ratio), tip: [`experts ${i} and ${j}`,
        `share ${observed} tokens; ${expected.toFixed(1)} expected`, few ? "too few to say" : times(ratio)] };
    }, "pairs of experts on the same token, in times of what is expected");
  };

  // ------------------------------------------------------------------ layers

  const drawLayer = () => { legend(); paint(); cards(); kindMaps(); similarityMap(); pairsMap(); };
  const drawAll = () => {
    readColors();
    const scale = `linear-gradient(to right,${diverging(0.25)},${diverging(1)},${diverging(4)})`;
    document.querySelectorAll(".diverging").forEach((bar) => { bar.style.background = scale; });
    loadMap();
    drawLayer();
  };
  const setLayer = (next) => {
    row = Math.max(0, Math.min(data.layers.length - 1, next));
    if (isolated !== null && isolated >= data.num_experts[row]) isolated = null;
    if ($("slider")) {
      $("slider").value = row;
      $("which").textContent = `layer ${data.layers[row]} (${row + 1} of ${data.layers.length})`;
    }
    document.querySelectorAll(".layer-name").forEach((name) => { name.textContent = `layer ${data.layers[row]}`; });
    document.documentElement.dataset.layer = data.layers[row];
    drawLayer();
  };
  const go = (next) => {
    const bounded = Math.max(0, Math.min(data.layers.length - 1, next));
    location.replace("#layer=" + data.layers[bounded]);
  };
  const fromAddress = () => {
    const found = /^#layer=(\d+)$/.exec(location.hash);
    if (!found || !data.layers.length) return;
    const wanted = Number(found[1]);
    setLayer(data.layers.reduce((best, layer, i) => (Math.abs(layer - wanted) < Math.abs(data.layers[best] - wanted) ? i : best), 0));
  };

  if ($("slider")) {
    $("slider").oninput = (event) => go(Number(event.target.value));
    $("previous").onclick = () => go(row - 1);
    $("next").onclick = () => go(row + 1);
    addEventListener("keydown", (event) => {
      if (event.target !== document.body || event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "ArrowLeft") go(row - 1);
      if (event.key === "ArrowRight") go(row + 1);
    });
  }
  document.querySelectorAll("[data-similarity]").forEach((button) => {
    button.onclick = () => {
      similarity = button.dataset.similarity;
      document.querySelectorAll("[data-similarity]").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      similarityMap();
    };
  });
  addEventListener("hashchange", fromAddress);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 120);
  });

  readColors();
  if (data.layers.length) setLayer(0);
  fromAddress();
  drawAll();
  document.documentElement.dataset.ready = "yes";
})();
