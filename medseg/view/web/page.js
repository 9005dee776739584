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
    meshThicknessOn2D: 0, // surfaces are for 3D, outlines for planes
    show3Dcrosshair: true,
    dragMode: 4, // as in 3D Slicer: right drag zooms, middle drag moves
    logLevel: "error",
    loadingText: "",
    clipPlaneHotKey: "",
    cycleClipPlaneHotKey: "",
    viewModeHotKey: "",
  });
  let scan, labels;
  const surfaces = new Map(); // of structures in 3D, by index; empty where this browser cannot unpack them
  let layout = "four", current = -1, opacity = 0.5, labelsOn = true;

  // ------------------------------------------------------------------ pictures
  // A plane of the scan with its labels. Smooth: of the eight voxels around a point the label with
  // the largest share, by distance, so that borders are as fine as the picture, in any plane.
  // Outlines: where a point so many pixels further has another label.
  const PLANE = `#version 300 es
    precision highp float;
    precision highp int;
    uniform highp sampler3D volume;
    uniform highp sampler3D overlay;
    uniform float overlayOutlineWidth;
    uniform float overlayAlphaShader;
    uniform float opacity;
    in vec3 texPos;
    out vec4 color;
    vec4 labelAt(vec3 at) {
      ivec3 size = textureSize(overlay, 0);
      vec3 place = at * vec3(size) - 0.5;
      if (overlayAlphaShader < 0.5) return texelFetch(overlay, clamp(ivec3(round(place)), ivec3(0), size - 1), 0);
      ivec3 first = ivec3(floor(place));
      vec3 part = place - floor(place);
      vec4 near[8];
      float share[8];
      bool same = true;
      for (int n = 0; n < 8; n++) {
        ivec3 step = ivec3(n & 1, (n >> 1) & 1, n >> 2);
        near[n] = texelFetch(overlay, clamp(first + step, ivec3(0), size - 1), 0);
        vec3 side = mix(1.0 - part, part, vec3(step));
        share[n] = side.x * side.y * side.z;
        same = same && near[n] == near[0];
      }
      if (same) return near[0];
      vec4 best = near[0];
      float most = -1.0;
      for (int n = 0; n < 8; n++) {
        float sum = 0.0;
        for (int m = 0; m < 8; m++) if (near[m] == near[n]) sum += share[m];
        if (sum > most) { most = sum; best = near[n]; }
      }
      return best;
    }
    void main() {
      vec3 right = dFdx(texPos) * overlayOutlineWidth, down = dFdy(texPos) * overlayOutlineWidth;
      vec4 label = labelAt(texPos);
      if (overlayOutlineWidth > 0.0 && label.a > 0.0) {
        bool edge = labelAt(texPos + right) != label || labelAt(texPos - right) != label
          || labelAt(texPos + down) != label || labelAt(texPos - down) != label;
        label.a = edge ? 1.0 : 0.0;
      }
      color = vec4(mix(texture(volume, texPos).rgb, label.rgb, label.a), opacity);
    }`;

  function drawLabels() {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    for (const s of present) {
      table.R.push(s.shown[0]); table.G.push(s.shown[1]); table.B.push(s.shown[2]);
      table.A.push(s.visible ? 255 : 0); table.I.push(s.index); table.labels.push(s.name);
      const surface = surfaces.get(s.index);
      if (surface) surface.visible = labelsOn && s.visible && s.in3d;
    }
    labels.setColormapLabel(table);
    labels.opacity = labelsOn ? opacity : 0;
    redraw();
    const shown = present.filter((s) => s.visible).length;
    byId("count").textContent = labelsOn ? `${shown} of ${present.length}` : "off (L)";
  }

  // Outlines tell labels apart by their colours, so no two may be equal; the eye sees no difference of 1.
  function tellApart() {
    const used = new Set();
    for (const s of present) {
      const [r, g, b] = s.color;
      let n = 0;
      while (used.has(`${r},${g},${(b + n) % 256}`)) n += b < 128 ? 1 : 255;
      s.shown = [r, g, (b + n) % 256];
      used.add(s.shown.join());
    }
  }

  function redraw() {
    nv.updateGLVolume();
    // In 3D the scan would hide its labels: unless asked for, it is left out there, and surfaces
    // stand for the voxels of labels.
    const whole = byId("solid").checked;
    nv.opts.meshXRay = whole ? 0.4 : 0;
    nv.renderShader.use(nv.gl);
    nv.gl.uniform1f(nv.renderShader.uniforms.backOpacity, whole ? 1 : 0);
    if (surfaces.size) nv.gl.uniform1f(nv.renderShader.uniforms.overlays, 0);
    nv.drawScene();
  }

  // Voxels that are drawn in 3D, and be it invisibly, would hide what lies behind them.
  const drawVoxels = nv.drawImage3D;
  nv.drawImage3D = (...places) => {
    if (byId("solid").checked || !surfaces.size) drawVoxels.apply(nv, places);
  };

  // ------------------------------------------------------------------ surfaces
  async function unpacked() {
    if (typeof DecompressionStream === "undefined") return null;
    let packed;
    if (facts.served) {
      packed = await (await fetch(new URL("surfaces.gz", location.href))).arrayBuffer();
    } else {
      const data = byId("surfaces-data");
      packed = Uint8Array.from(atob(data.textContent), (letter) => letter.charCodeAt(0));
      data.remove();
    }
    const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(plain).arrayBuffer());
  }

  // See medseg/view/meshes/packing.py.
  async function loadSurfaces() {
    const about = facts.surfaces;
    const bytes = about.triangles ? await unpacked() : null;
    if (!bytes) return;
    const points = new Float32Array(3 * about.points), corners = new Uint32Array(3 * about.triangles);
    for (let axis = 0, n = 0; axis < 3; axis++) {
      let at = 0;
      for (let i = 0; i < about.points; i++, n++) {
        at = (at + bytes[n] + (bytes[n + 3 * about.points] << 8)) & 65535;
        points[3 * i + axis] = about.low[axis] + at * about.step[axis];
      }
    }
    const from = 6 * about.points, count = corners.length;
    for (let i = 0, next = 0; i < count; i++) {
      const back = bytes[from + i] + (bytes[from + count + i] << 8) + (bytes[from + 2 * count + i] << 16);
      corners[i] = next - back;
      if (back === 0) next++;
    }
    for (const s of present) {
      const buffer = surfaceFile(s.index, points, corners, about.walls);
      if (!buffer) continue;
      const surface = await niivue.NVMesh.readMesh(buffer, `${s.index}.mz3`, nv.gl, 1, [...s.color, 255]);
      nv.meshes.push(surface); // without drawing everything anew for each
      surfaces.set(s.index, surface);
    }
  }

  function surfaceFile(index, points, corners, walls) { // as MZ3, which the viewer library reads
    const triangles = [];
    let start = 0;
    for (const [first, second, count] of walls) {
      if (first === index || second === index) {
        for (let i = start; i < start + 3 * count; i += 3) {
          const [b, c] = first === index ? [1, 2] : [2, 1]; // outwards
          triangles.push(corners[i], corners[i + b], corners[i + c]);
        }
      }
      start += 3 * count;
    }
    if (!triangles.length) return null;
    const numbers = new Map();
    for (const corner of triangles) if (!numbers.has(corner)) numbers.set(corner, numbers.size);
    const buffer = new ArrayBuffer(16 + 4 * triangles.length + 12 * numbers.size);
    const view = new DataView(buffer);
    view.setUint16(0, 23117, true);
    view.setUint16(2, 3, true);
    view.setUint32(4, triangles.length / 3, true);
    view.setUint32(8, numbers.size, true);
    triangles.forEach((corner, i) => view.setUint32(16 + 4 * i, numbers.get(corner), true));
    let at = 16 + 4 * triangles.length;
    for (const corner of numbers.keys()) {
      for (let axis = 0; axis < 3; axis++, at += 4) view.setFloat32(at, points[3 * corner + axis], true);
    }
    return buffer;
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
      const hit = document.createElement("label");
      hit.className = "hit";
      hit.append(box);
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
      item.append(hit, swatch, name);
      if (there) item.append(buttonOf3d(s));
      item.append(ml);
      list.append(item);
    }
    byId("search").hidden = structures.length < SEARCH_FROM;
    const fluid = present.some((s) => s.fluid) ? ["Fluid is off in 3D at first, for it hides what lies in it; 3D beside a name switches it on."] : [];
    for (const text of [...facts.notes, ...fluid]) {
      const note = document.createElement("li");
      note.textContent = text;
      byId("notes").append(note);
    }
  }

  function buttonOf3d(s) {
    s.in3d = !s.fluid;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "in-3d";
    button.textContent = "3D";
    button.setAttribute("aria-label", `${s.name} in 3D`);
    button.setAttribute("aria-pressed", String(s.in3d));
    button.addEventListener("click", () => showIn3d(s, !s.in3d));
    s.button3d = button;
    return button;
  }

  function showIn3d(s, on) {
    s.in3d = on;
    s.button3d.setAttribute("aria-pressed", String(on));
    if (on && !s.visible) show(s, true);
    drawLabels();
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
    nv.overlayOutlineWidth = on ? Math.max(1, nv.uiData.dpr) : 0;
    redraw();
  }

  function setSmooth(on) {
    nv.overlayAlphaShader = on ? 1 : 0; // what this page's own shader of planes takes it for
    nv.setInterpolation(!on);
    redraw();
  }

  function structureAt(mm) {
    const [i, j, k] = labels.mm2vox(Array.from(mm).slice(0, 3), true).map(Math.round);
    const [, nx, ny, nz] = labels.hdr.dims;
    const inside = i >= 0 && j >= 0 && k >= 0 && i < nx && j < ny && k < nz;
    return inside ? present.find((s) => s.index === labels.img[i + nx * (j + ny * k)]) : undefined;
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
    d: () => { const s = present[current]; if (s) showIn3d(s, !s.in3d); },
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

  // ------------------------------------------------------------------ fingers
  const DOUBLE_TAP_MS = 350, NEAR = 30;
  const fingers = { count: 0, tile: "", lastTap: 0, lastX: 0, lastY: 0, moved: false };

  function placeOf(touches) { // in the picture: the middle of all fingers, and how far two are apart
    const { left, top } = byId("canvas").getBoundingClientRect();
    const x = touches.map((t) => t.clientX - left), y = touches.map((t) => t.clientY - top);
    const middle = (list) => list.reduce((sum, one) => sum + one, 0) / list.length;
    return { x: middle(x), y: middle(y), apart: x.length > 1 ? Math.hypot(x[0] - x[1], y[0] - y[1]) : 0 };
  }

  function tileAt(x, y) {
    const { left, top } = byId("canvas").getBoundingClientRect();
    for (const tile of byId("tiles").children) {
      const box = tile.getBoundingClientRect();
      if (x + left >= box.left && x + left < box.right && y + top >= box.top && y + top < box.bottom) return tile.dataset.plane;
    }
    return "";
  }

  function onTouch(event) {
    event.preventDefault();
    event.stopPropagation(); // the viewer library takes a long or a double tap for another grey window
    const touches = [...event.touches].slice(0, 2);
    if (event.type === "touchstart" || (touches.length && touches.length !== fingers.count)) beginTouch(touches);
    else if (event.type === "touchmove" && touches.length) moveTouch(touches);
    else if (!touches.length) endTouch(event.timeStamp);
    fingers.count = touches.length;
  }

  function beginTouch(touches) {
    const place = placeOf(touches);
    fingers.moved = touches.length > 1;
    Object.assign(fingers, { x: place.x, y: place.y, apart: place.apart, tile: tileAt(place.x, place.y) });
    fingers.zoom = fingers.tile === "render" ? nv.scene.volScaleMultiplier : nv.scene.pan2Dxyzmm[3];
    fingers.pan = Array.from(nv.scene.pan2Dxyzmm);
    if (touches.length === 1) { nv.mouseDown(place.x, place.y); nv.mouseClick(place.x, place.y); }
  }

  function moveTouch(touches) {
    const place = placeOf(touches);
    if (Math.hypot(place.x - fingers.x, place.y - fingers.y) > 8) fingers.moved = true;
    if (touches.length === 1) {
      nv.mouseClick(place.x, place.y);
      nv.mouseMove(place.x, place.y);
      return;
    }
    const zoom = Math.min(20, Math.max(0.3, fingers.zoom * (place.apart || 1) / (fingers.apart || 1)));
    if (fingers.tile === "render") {
      nv.scene.volScaleMultiplier = zoom;
    } else {
      nv.uiData.pan2DxyzmmAtMouseDown = Float32Array.from(fingers.pan);
      const dpr = nv.uiData.dpr;
      nv.scene.pan2Dxyzmm[3] = zoom;
      nv.dragForPanZoom([fingers.x, fingers.y, place.x, place.y].map((at) => at * dpr));
      nv.scene.pan2Dxyzmm[3] = zoom;
    }
    nv.drawScene();
  }

  function endTouch(now) {
    nv.mouseUpListener();
    const again = now - fingers.lastTap < DOUBLE_TAP_MS && Math.hypot(fingers.x - fingers.lastX, fingers.y - fingers.lastY) < NEAR;
    if (!fingers.moved && again) setLayout(layout === "four" ? fingers.tile || "four" : "four");
    Object.assign(fingers, { lastTap: fingers.moved || again ? 0 : now, lastX: fingers.x, lastY: fingers.y });
  }

  function listen() {
    for (const kind of ["touchstart", "touchmove", "touchend", "touchcancel"]) {
      byId("pictures").addEventListener(kind, onTouch, { capture: true, passive: false });
    }
    window.addEventListener("keydown", onKey, true);
    byId("canvas").addEventListener("keyup", (event) => event.stopImmediatePropagation(), true);
    byId("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
    byId("level").addEventListener("input", setWindow);
    byId("width").addEventListener("input", setWindow);
    byId("outline").addEventListener("change", (event) => setOutline(event.target.checked));
    byId("smooth").addEventListener("change", (event) => setSmooth(event.target.checked));
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
      nv.setCustomSliceShader(PLANE);
      tellApart();
      await loadSurfaces();
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
