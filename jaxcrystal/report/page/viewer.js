// Draws crystals on canvases that turn and zoom together: what is behind is painted first.

const BALL = 0.55; // share of its covalent radius with which an atom is drawn, so that bonds show between atoms
const STICK = 0.1; // radius of a bond, Å
const FILL = 0.93; // a corner may leave the picture, by this much, when it points straight to its border
const PIECES = 16; // into which an edge of the cell is cut, each painted at its own depth
const FOG = 6; // shades in which atoms fade with depth

const mix = (colour, other, share) => colour.map((c, k) => Math.round(c * (1 - share) + other[k] * share));
const css = colour => `rgb(${colour.join(",")})`;
const channels = hex => [1, 3, 5].map(k => parseInt(hex.slice(k, k + 2), 16));

/** How all views look at their crystals. */
class Camera {
  constructor() { this.views = []; this.reset(); }

  reset() {
    this.zoom = 1;
    this.rotation = [[1, 0, 0], [0, 1, 0], [0, 0, 1]];
    this.turn(-24, 13);
  }

  /** Turns the crystals by degrees: to the right about the upright, and towards the reader from above. */
  turn(right, down) {
    const [a, b] = [right, down].map(angle => angle * Math.PI / 180);
    const yaw = [[Math.cos(a), 0, Math.sin(a)], [0, 1, 0], [-Math.sin(a), 0, Math.cos(a)]];
    const pitch = [[1, 0, 0], [0, Math.cos(b), -Math.sin(b)], [0, Math.sin(b), Math.cos(b)]];
    const product = (m, n) => m.map(row => [0, 1, 2].map(k => row[0] * n[0][k] + row[1] * n[1][k] + row[2] * n[2][k]));
    this.rotation = product(pitch, product(yaw, this.rotation));
    this.changed();
  }

  roll(angle) {
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)], [x, y, z] = this.rotation;
    this.rotation = [minus(times(cos, x), times(sin, y)), plus(times(sin, x), times(cos, y)), z];
    this.changed();
  }

  scale(factor) {
    this.zoom = Math.min(Math.max(this.zoom * factor, 0.4), 8);
    this.changed();
  }

  changed() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.views.forEach(view => view.draw()); });
  }

  /** Å from the middle of a picture to its border: the same in all views, so that sizes compare. */
  get reach() { return Math.max(...this.views.map(view => view.scene ? view.scene.extent + view.largest : 0)); }
}

class View {
  constructor(canvas, camera, elements) {
    Object.assign(this, {canvas, camera, elements, scene: null, largest: 0, pointers: new Map()});
    camera.views.push(this);
    canvas.addEventListener("pointerdown", event => this.press(event));
    canvas.addEventListener("pointermove", event => this.drag(event));
    for (const end of ["pointerup", "pointercancel"])
      canvas.addEventListener(end, event => this.pointers.delete(event.pointerId));
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      camera.scale(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
    }, {passive: false});
    canvas.addEventListener("dblclick", () => camera.reset());
    canvas.addEventListener("keydown", event => this.key(event));
    new ResizeObserver(() => camera.changed()).observe(canvas);
  }

  /** Shows `cells` cells of a crystal along each edge, or nothing. */
  show(crystal, cells) {
    this.scene = crystal && scene(crystal, this.elements, cells);
    this.largest = crystal ? Math.max(...new Set(crystal.species.map(z => this.radius(z)))) : 0;
    this.pieces = crystal ? this.edgePieces() : [];
    this.camera.changed();
  }

  /** Of a ball, Å. */
  radius(z) { return BALL * this.elements[z][2]; }

  /** The cell's edges in pieces, without those inside a ball. */
  edgePieces() {
    const {atoms, corners} = this.scene, pieces = [];
    for (let i = 0; i < 8; i++) for (const bit of [1, 2, 4]) if (!(i & bit)) {
      const along = minus(corners[i | bit], corners[i]);
      const at = k => plus(corners[i], times(k / PIECES, along));
      for (let k = 0; k < PIECES; k++)
        if (!atoms.some(atom => norm(minus(atom.at, at(k + 0.5))) < this.radius(atom.z))) pieces.push([at(k), at(k + 1)]);
    }
    return pieces;
  }

  press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
  }

  drag(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    if (this.pointers.size === 1) {
      const degrees = 200 / this.canvas.clientWidth;
      this.camera.turn((now[0] - before[0]) * degrees, (now[1] - before[1]) * degrees);
    } else if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const span = place => [place[0] - other[0], place[1] - other[1]];
      const [from, to] = [span(before), span(now)];
      if (Math.hypot(...from) > 1 && Math.hypot(...to) > 1) {
        this.camera.scale(Math.hypot(...to) / Math.hypot(...from));
        this.camera.roll(Math.atan2(from[1], from[0]) - Math.atan2(to[1], to[0]));
      }
    }
    this.pointers.set(event.pointerId, now);
  }

  key(event) {
    const camera = this.camera, step = event.shiftKey ? 2 : 10;
    const moves = {
      ArrowLeft: () => camera.turn(-step, 0), ArrowRight: () => camera.turn(step, 0),
      ArrowUp: () => camera.turn(0, -step), ArrowDown: () => camera.turn(0, step),
      "+": () => camera.scale(1.15), "=": () => camera.scale(1.15), "-": () => camera.scale(1 / 1.15),
      0: () => camera.reset(),
    };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moves[event.key]();
  }

  draw() {
    const {canvas, camera} = this, pen = canvas.getContext("2d");
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map(x => Math.round(x * devicePixelRatio));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    pen.clearRect(0, 0, width, height);
    if (!this.scene || !width) return;
    const {atoms, bonds, middle, edges} = this.scene;
    const scale = camera.zoom * Math.min(width, height) / 2 / (camera.reach * FILL);
    const place = point => {
      const from = minus(point, middle), [x, y, z] = camera.rotation.map(row => dot(row, from));
      return [width / 2 + x * scale, height / 2 - y * scale, z];
    };
    const paper = getComputedStyle(canvas);
    this.background = paper.getPropertyValue("--surface").trim();
    this.ink = channels(paper.getPropertyValue("--edge").trim());
    const shapes = [];
    const haze = z => Math.min(Math.max(Math.round((0.5 - z / camera.reach / 2) * FOG - FOG / 4), 0), FOG - 1);
    const points = atoms.map(atom => place(atom.at));
    const radii = atoms.map(atom => this.radius(atom.z));
    for (const [p, q] of this.pieces.map(piece => piece.map(place)))
      shapes.push([(p[2] + q[2]) / 2 - 0.01, () => this.edge(pen, p, q, haze(p[2]))]);
    for (const [i, j] of bonds) {
      const along = minus(atoms[j].at, atoms[i].at), length = norm(along);
      const half = place(plus(atoms[i].at, times(0.5, along)));
      for (const [k, way] of [[i, 1], [j, -1]]) {
        // From the ball's surface: from its centre the stick would be painted over the ball.
        const start = place(plus(atoms[k].at, times(way * Math.min(0.94 * radii[k] / length, 0.5), along)));
        shapes.push([(start[2] + half[2]) / 2, () => this.stick(pen, start, half, atoms[k].z, haze(start[2]), scale)]);
      }
    }
    points.forEach(([x, y, z], i) => shapes.push([z, () => {
      const r = radii[i] * scale;
      pen.drawImage(this.ball(atoms[i].z, haze(z)), x - r, y - r, 2 * r, 2 * r);
    }]));
    shapes.sort((p, q) => p[0] - q[0]);
    for (const [, paint] of shapes) paint();
    this.axes(pen, edges, width, height);
  }

  edge(pen, from, to, haze) {
    pen.strokeStyle = css(mix(this.ink, channels(this.background), haze / FOG / 1.5));
    pen.lineWidth = 1.2 * devicePixelRatio;
    pen.lineCap = "round";
    line(pen, from, to);
  }

  /** A bond's half, brighter along its middle. */
  stick(pen, [x1, y1], [x2, y2], z, haze, scale) {
    const colour = this.faded(z, haze), width = 2 * STICK * scale;
    pen.lineCap = "butt";
    for (const [shade, share] of [[mix(colour, [0, 0, 0], 0.42), 1], [mix(colour, [0, 0, 0], 0.14), 0.66],
      [mix(colour, [255, 255, 255], 0.22), 0.26]]) {
      pen.strokeStyle = css(shade);
      pen.lineWidth = width * share;
      line(pen, [x1, y1], [x2, y2]);
    }
  }

  faded(z, haze) { return mix(channels(this.elements[z][1]), channels(this.background), 0.62 * haze / FOG); }

  /** A picture of an atom as a shaded sphere. */
  ball(z, haze) {
    const key = [z, haze, this.background].join();
    this.balls ??= new Map();
    if (!this.balls.has(key)) {
      const size = 160, picture = document.createElement("canvas"), pen = picture.getContext("2d"), r = size / 2;
      picture.width = picture.height = size;
      const colour = this.faded(z, haze), light = pen.createRadialGradient(r * 0.68, r * 0.6, r * 0.04, r * 0.85, r * 0.8, r * 1.22);
      light.addColorStop(0, css(mix(colour, [255, 255, 255], 0.8)));
      light.addColorStop(0.22, css(mix(colour, [255, 255, 255], 0.32)));
      light.addColorStop(0.5, css(colour));
      light.addColorStop(0.82, css(mix(colour, [0, 0, 0], 0.34)));
      light.addColorStop(1, css(mix(colour, [0, 0, 0], 0.58)));
      pen.fillStyle = light;
      pen.beginPath();
      pen.arc(r, r, r - 1, 0, 2 * Math.PI);
      pen.fill();
      this.balls.set(key, picture);
    }
    return this.balls.get(key);
  }

  /** In the corner, where the cell's edges a, b and c point. */
  axes(pen, edges, width, height) {
    const size = 26 * devicePixelRatio, [x, y] = [1.7 * size, height - 1.7 * size];
    const ends = edges.map((edge, k) => {
      const [right, up, front] = this.camera.rotation.map(row => dot(row, edge) / norm(edge));
      return {to: [x + right * size, y - up * size], label: [x + right * size * 1.38, y - up * size * 1.38], front, k};
    });
    pen.font = `600 ${12 * devicePixelRatio}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineCap = "round";
    for (const {to, label, k} of ends.sort((p, q) => p.front - q.front)) {
      pen.strokeStyle = pen.fillStyle = ["#d0453a", "#3f9a4a", "#3d78d6"][k];
      pen.lineWidth = 2.2 * devicePixelRatio;
      line(pen, [x, y], to);
      pen.fillText("abc"[k], ...label);
    }
  }
}

function line(pen, from, to) {
  pen.beginPath();
  pen.moveTo(from[0], from[1]);
  pen.lineTo(to[0], to[1]);
  pen.stroke();
}
