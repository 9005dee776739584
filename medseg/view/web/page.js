"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const facts = JSON.parse(byId("facts").textContent);
  const structures = facts.structures;
  const present = structures.filter((s) => s.index > 0);
  const AXIAL = 0, CORONAL = 1, SAGITTAL = 2, RENDER = 4;
  const PLANES = {
    axial: [AXIAL, "Axial"], coronal: [CORONAL, "Coronal"], sagittal: [SAGITTAL, "Sagittal"], render: [RENDER, "3D"],
  };
  const FOUR = { axial: [0, 0, 0.5, 0.5], render: [0.5, 0, 0.5, 0.5], coronal: [0, 0.5, 0.5, 0.5], sagittal: [0.5, 0.5, 0.5, 0.5] };
  const LETTERS = { axial: "RLAP", coronal: "RLSI", sagittal: "APSI", render: "" }; // left, right, top, bottom
  const LAYOUTS = ["four", "axial", "coronal", "sagittal", "render"];
  const SEARCH_FROM = 9; // structures

  const nv = new niivue.Niivue({
    isRadiologicalConvention: true, // right is left, as in 3D Slicer
    sagittalNoseLeft: true,
    isOrientationTextVisible: false, // the page has letters of its own, readable over any grey
    isOrientCube: true,
    dragAndDropEnabled: false,
    backColor: [0, 0, 0, 1],
    crosshairColor: [0.45, 0.75, 1, 0.75],
    crosshairWidth: 0.25,
    crosshairWidthUnit: "percent",
    crosshairGap: 2.5,
    dragMode: 4, // as in 3D Slicer: right drag zooms, middle drag moves
    logLevel: "error",
    loadingText: "",
    clipPlaneHotKey: "",
    cycleClipPlaneHotKey: "",
    viewModeHotKey: "",
  });
  let scan, labels, filled, outlined; // the last two: what labels.img holds, whole structures or their borders
  let layout = "four", current = -1, opacity = 0.5, labelsOn = true;

  // ------------------------------------------------------------------ pictures
  function drawLabels() {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    for (const s of present) {
      table.R.push(s.color[0]); table.G.push(s.color[1]); table.B.push(s.color[2]);
      table.A.push(s.visible ? 255 : 0); table.I.push(s.index); table.labels.push(s.name);
    }
    labels.setColormapLabel(table);
    labels.opacity = labelsOn ? opacity : 0;
    redraw();
    const shown = present.filter((s) => s.visible).length;
    byId("count").textContent = labelsOn ? `${shown} of ${present.length}` : "off (L)";
  }

  function redraw() {
    nv.updateGLVolume();
    // In 3D the scan would hide its labels: unless asked for, it is left out there.
    nv.renderShader.use(nv.gl);
    nv.gl.uniform1f(nv.renderShader.uniforms.backOpacity, byId("solid").checked ? 1 : 0);
    nv.drawScene();
  }

  function setLayout(name) {
    layout = name;
    const places = name === "four" ? FOUR : { [name]: [0, 0, 1, 1] };
    const tiles = byId("tiles");
    tiles.replaceChildren();
    nv.setCustomLayout(Object.entries(places).map(([plane, position]) => ({ sliceType: PLANES[plane][0], position })));
    for (const [plane, [left, top, width, height]] of Object.entries(places)) {
      const tile = document.createElement("div");
      tile.className = left > 0 ? "tile right" : "tile";
      tile.dataset.plane = plane;
      Object.assign(tile.style, { left: `${left * 100}%`, top: `${top * 100}%`, width: `${width * 100}%`, height: `${height * 100}%` });
      tile.style.setProperty("--plane", `var(--${plane})`);
      const caption = document.createElement("span");
      caption.textContent = PLANES[plane][1];
      tile.append(caption);
      for (const [side, letter] of [..."left right top bottom".split(" ").entries()].map(([n, edge]) => [edge, LETTERS[plane][n]])) {
        if (!letter) continue;
        const mark = document.createElement("b");
        mark.className = side;
        mark.textContent = letter;
        tile.append(mark);
      }
      tiles.append(tile);
    }
    for (const button of byId("layouts").children) {
      const on = button.dataset.layout === name;
      button.setAttribute("aria-checked", String(on));
      button.tabIndex = on ? 0 : -1;
    }
  }

  function goTo(mm) {
    nv.scene.crosshairPos = nv.mm2frac(mm, 0, true);
    nv.createOnLocationChange();
    nv.drawScene();
  }

  function step(x, y, z) { // voxels to the patient's left-to-right, back-to-front, foot-to-head
    nv.moveCrosshairInVox(x, y, z);
  }

  function showPlace(place) {
    const words = [["R", "L"], ["A", "P"], ["S", "I"]].map(([plus, minus], axis) => {
      const at = place.mm[axis];
      return `${at < 0 ? minus : plus} ${Math.abs(at).toFixed(1)}`;
    });
    byId("position").textContent = `${words.join("  ")} mm`;
    const grey = place.values[0].value * facts.slope + facts.intercept;
    byId("intensity").textContent = `intensity ${Number(grey.toPrecision(4))}${facts.unit}`;
    byId("here").textContent = structureAt(place.mm)?.name ?? "";
  }

  // ------------------------------------------------------------------ grey window, in the scan's own units
  const toStored = (grey) => (grey - facts.intercept) / facts.slope;
  function setWindow() {
    const level = Number(byId("level").value), width = Number(byId("width").value);
    for (const [id, value] of [["level", level], ["width", width]]) {
      byId(`${id}-text`).textContent = String(Number(value.toPrecision(4)));
    }
    scan.cal_min = toStored(level - width / 2);
    scan.cal_max = toStored(level + width / 2);
    redraw();
  }

  function resetWindow() {
    const { low, high, min, max } = facts.window;
    const span = max - min || 1;
    const size = Math.max(10 ** Math.floor(Math.log10(span / 200)), Number.EPSILON);
    for (const [id, least, most, value] of [["level", min, max, (low + high) / 2], ["width", size, 1.5 * span, high - low]]) {
      const input = byId(id);
      input.min = String(least); input.max = String(most); input.step = String(size / 10); input.value = String(value);
    }
    setWindow();
  }

  // ------------------------------------------------------------------ legend
  function fillLegend() {
    const list = byId("legend");
    for (const s of structures) {
      const item = document.createElement("li");
      const there = s.index > 0;
      s.item = item;
      s.visible = there;
      item.dataset.value = String(s.value);
      const box = document.createElement("input");
      box.type = "checkbox";
      box.checked = there;
      box.disabled = !there;
      box.setAttribute("aria-label", `Show ${s.name}`);
      box.addEventListener("change", () => { show(s, box.checked); drawLabels(); });
      s.box = box;
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.backgroundColor = `rgb(${s.color.join(", ")})`;
      const name = document.createElement(there ? "button" : "span");
      name.textContent = s.name;
      if (there) {
        name.type = "button";
        name.title = `Go to ${s.name} (label ${s.value})`;
        name.addEventListener("click", () => choose(present.indexOf(s)));
      } else {
        name.className = "name";
        item.className = "absent";
      }
      const ml = document.createElement("span");
      ml.className = "ml";
      ml.textContent = there ? `${volume(s.ml)} mL` : "not found";
      item.append(box, swatch, name, ml);
      list.append(item);
    }
    byId("search").hidden = structures.length < SEARCH_FROM;
    for (const text of facts.notes) {
      const note = document.createElement("li");
      note.textContent = text;
      byId("notes").append(note);
    }
  }

  const volume = (ml) => (ml >= 100 ? ml.toFixed(0) : ml >= 10 ? ml.toFixed(1) : ml >= 0.1 ? ml.toFixed(2) : ml.toPrecision(2));

  function show(s, on) {
    s.visible = on;
    s.box.checked = on;
    s.item.classList.toggle("hidden-structure", !on);
  }

  function showAll(on) {
    for (const s of present) show(s, on);
    drawLabels();
  }

  function choose(number) {
    if (!present.length) return;
    present[current]?.item.classList.remove("current");
    current = (number + present.length) % present.length;
    const s = present[current];
    s.item.classList.add("current");
    s.item.scrollIntoView({ block: "nearest" });
    goTo(s.centre);
  }

  function soloOrAll() {
    const s = present[current];
    if (!s) return;
    const alone = s.visible && present.every((other) => other === s || !other.visible);
    for (const other of present) show(other, alone || other === s);
    drawLabels();
  }

  function search() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const s of structures) s.item.hidden = !words.every((word) => s.name.toLowerCase().includes(word));
    for (const s of structures) s.item.style.display = s.item.hidden ? "none" : "";
  }

  // ------------------------------------------------------------------ controls
  function setOpacity(share) {
    opacity = Math.min(1, Math.max(0, share));
    labelsOn = true;
    byId("opacity").value = String(Math.round(opacity * 100));
    byId("opacity-text").textContent = `${Math.round(opacity * 100)} %`;
    drawLabels();
  }

  function setOutline(on) {
    byId("outline").checked = on;
    if (on && !outlined) outlined = borders(filled, labels.hdr.dims);
    labels.img = on ? outlined : filled;
    redraw();
  }

  function borders(whole, [, nx, ny, nz]) { // voxels with a neighbour of another structure, the others 0
    const out = new whole.constructor(whole.length);
    const row = nx, plane = nx * ny;
    for (let k = 0, at = 0; k < nz; k++) {
      for (let j = 0; j < ny; j++) {
        for (let i = 0; i < nx; i++, at++) {
          const value = whole[at];
          if (value && ((i && whole[at - 1] !== value) || (i < nx - 1 && whole[at + 1] !== value)
            || (j && whole[at - row] !== value) || (j < ny - 1 && whole[at + row] !== value)
            || (k && whole[at - plane] !== value) || (k < nz - 1 && whole[at + plane] !== value))) out[at] = value;
        }
      }
    }
    return out;
  }

  function structureAt(mm) {
    const [i, j, k] = labels.mm2vox(Array.from(mm).slice(0, 3), true).map(Math.round);
    const [, nx, ny, nz] = labels.hdr.dims;
    const inside = i >= 0 && j >= 0 && k >= 0 && i < nx && j < ny && k < nz;
    return inside ? present.find((s) => s.index === filled[i + nx * (j + ny * k)]) : undefined;
  }

  function turnAndScale() {
    nv.scene.volScaleMultiplier = 1.25;
    nv.setRenderAzimuthElevation(...facts.turn);
  }

  function reset() {
    nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    turnAndScale();
    resetWindow();
  }

  const KEYS = {
    l: () => { labelsOn = !labelsOn; drawLabels(); },
    "[": () => setOpacity(opacity - 0.1),
    "]": () => setOpacity(opacity + 0.1),
    o: () => setOutline(!byId("outline").checked),
    n: () => choose(current + 1),
    p: () => choose(current < 0 ? -1 : current - 1),
    v: () => { const s = present[current]; if (s) { show(s, !s.visible); drawLabels(); } },
    s: soloOrAll,
    a: () => showAll(!present.every((s) => s.visible)),
    "/": () => { if (!byId("search").hidden) byId("search").focus(); },
    "?": () => byId("help").showModal(),
    r: reset,
    ArrowUp: () => step(0, 0, 1),
    ArrowDown: () => step(0, 0, -1),
    ArrowRight: () => step(-1, 0, 0),
    ArrowLeft: () => step(1, 0, 0),
    PageUp: () => step(0, 1, 0),
    PageDown: () => step(0, -1, 0),
  };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const field = event.target;
    const typing = field.id === "search";
    if (typing && event.key === "Escape") { field.value = ""; search(); field.blur(); }
    if (typing) return;
    if (field.type === "range" && /^(Arrow|Page|Home|End)/.test(event.key)) return;
    if (field.getAttribute?.("role") === "radio" && /^Arrow/.test(event.key)) {
      const next = event.key === "ArrowRight" || event.key === "ArrowDown" ? 1 : -1;
      setLayout(LAYOUTS[(LAYOUTS.indexOf(layout) + next + LAYOUTS.length) % LAYOUTS.length]);
      byId("layouts").querySelector('[aria-checked="true"]').focus();
      event.preventDefault();
      return;
    }
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const number = "12345".indexOf(key);
    const act = key.length === 1 && number >= 0 ? () => setLayout(LAYOUTS[number]) : KEYS[key];
    if (act) {
      event.preventDefault();
      act();
    }
    // The viewer library has keys of its own on the canvas; they are not these.
    if (field === byId("canvas") && key !== "Tab") event.stopPropagation();
  }

  function listen() {
    window.addEventListener("keydown", onKey, true);
    byId("canvas").addEventListener("keyup", (event) => event.stopImmediatePropagation(), true);
    byId("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
    byId("level").addEventListener("input", setWindow);
    byId("width").addEventListener("input", setWindow);
    byId("outline").addEventListener("change", (event) => setOutline(event.target.checked));
    byId("smooth").addEventListener("change", (event) => nv.setInterpolation(!event.target.checked));
    byId("solid").addEventListener("change", redraw);
    byId("reset").addEventListener("click", reset);
    byId("all-on").addEventListener("click", () => showAll(true));
    byId("all-off").addEventListener("click", () => showAll(false));
    byId("search").addEventListener("input", search);
    byId("help-open").addEventListener("click", () => byId("help").showModal());
    for (const button of byId("layouts").children) {
      button.addEventListener("click", () => setLayout(button.dataset.layout));
    }
  }

  // ------------------------------------------------------------------ begin
  function fail(text) {
    document.documentElement.dataset.state = "failed";
    byId("message").textContent = text;
  }

  async function load(name) {
    if (facts.served) {
      const file = `${name}.nii`;
      return niivue.NVImage.loadFromUrl({ url: new URL(file, location.href).href, name: file });
    }
    const data = byId(`${name}-data`);
    const image = await niivue.NVImage.loadFromBase64({ base64: data.textContent, name: `${name}.nii.gz` });
    data.remove(); // the page need not hold it twice
    return image;
  }

  async function begin() {
    fillLegend();
    if (!document.createElement("canvas").getContext("webgl2")) {
      fail("This page needs WebGL 2: open it in a current Firefox, Chrome, Edge or Safari.");
      return;
    }
    try {
      await nv.attachToCanvas(byId("canvas"));
      scan = await load("scan");
      labels = await load("labels");
      scan.name = "scan";
      labels.name = "labels";
      nv.addVolume(scan);
      nv.addVolume(labels);
      filled = labels.img;
      nv.onLocationChange = showPlace;
      listen();
      setLayout("four");
      turnAndScale();
      resetWindow();
      setOpacity(opacity);
      goTo(facts.start);
      document.documentElement.dataset.state = "ready";
    } catch (error) {
      console.error(error);
      fail("The scan could not be shown; it may be too large for this browser.");
    }
  }

  begin();
})();
