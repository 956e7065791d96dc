// A crystal of the page: its numbers as packed.py packed them, its atoms in space, its bonds.

const BOND = 1.15; // atoms are joined if closer than this multiple of the sum of their covalent radii,
const SHELL = 1.12; // and than this multiple of the nearest neighbour's distance of one of them
const MOST_BONDED = 3000; // atoms: of more than these no bonds are sought, for every pair is looked at
const BORDER = 0.015; // of a cell's edge: an atom that close to a face is drawn on the opposite face too

/** The packed crystals, of which one is read when it is asked for. */
class Crystals {
  constructor(base64) {
    const text = atob(base64);
    this.bytes = new DataView(new ArrayBuffer(text.length));
    for (let i = 0; i < text.length; i++) this.bytes.setUint8(i, text.charCodeAt(i));
    this.starts = [];
    for (let at = 0; at < text.length; at += 26 + 7 * this.bytes.getUint16(at, true)) this.starts.push(at);
  }

  /** Lengths in Å, angles in degrees, atomic numbers, fractional coordinates of crystal number `index`. */
  read(index) {
    let at = this.starts[index];
    const atoms = this.bytes.getUint16(at, true);
    const cell = Array.from({length: 6}, (_, k) => this.bytes.getFloat32(at + 2 + 4 * k, true));
    at += 26;
    const species = Array.from({length: atoms}, (_, i) => this.bytes.getUint8(at + i));
    at += atoms;
    const coordinate = k => this.bytes.getUint16(at + 2 * k, true) / 65536;
    const fractions = Array.from({length: atoms}, (_, i) => [0, 1, 2].map(k => coordinate(3 * i + k)));
    return {lengths: cell.slice(0, 3), angles: cell.slice(3), species, fractions};
  }
}

const dot = (u, v) => u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
const plus = (u, v) => [u[0] + v[0], u[1] + v[1], u[2] + v[2]];
const minus = (u, v) => [u[0] - v[0], u[1] - v[1], u[2] - v[2]];
const times = (s, v) => [s * v[0], s * v[1], s * v[2]];
const cross = (u, v) => [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
const norm = v => Math.hypot(...v);

/** The cell's edges a, b, c (Å); c points up, b lies in the plane of the picture, a comes towards the reader. */
function lattice({lengths: [a, b, c], angles}) {
  const [alpha, beta, gamma] = angles.map(angle => angle * Math.PI / 180);
  const ax = a * (Math.cos(gamma) - Math.cos(beta) * Math.cos(alpha)) / Math.sin(alpha), ay = a * Math.cos(beta);
  return [
    [ax, ay, Math.sqrt(Math.max(a * a - ax * ax - ay * ay, 0))],
    [b * Math.sin(alpha), b * Math.cos(alpha), 0],
    [0, c, 0],
  ];
}

const inSpace = (edges, [x, y, z]) => plus(times(x, edges[0]), plus(times(y, edges[1]), times(z, edges[2])));
const volume = edges => Math.abs(dot(edges[0], cross(edges[1], edges[2])));

/** The distance of each atom to its nearest neighbour, in this cell or another one (Å). */
function nearestNeighbours(crystal, edges, reach) {
  const places = crystal.fractions.map(f => inSpace(edges, f)), shifts = [];
  // As many cells on each side as a sphere of radius `reach` meets.
  const [na, nb, nc] = edges.map((_, k) => {
    const height = volume(edges) / norm(cross(edges[(k + 1) % 3], edges[(k + 2) % 3]));
    return Math.min(Math.ceil(reach / height), 4);
  });
  for (let i = -na; i <= na; i++) for (let j = -nb; j <= nb; j++) for (let k = -nc; k <= nc; k++)
    shifts.push(inSpace(edges, [i, j, k]));
  return places.map((here, i) => {
    let least = Infinity;
    places.forEach((there, j) => {
      const between = minus(there, here);
      for (const shift of shifts) {
        const x = between[0] + shift[0], y = between[1] + shift[1], z = between[2] + shift[2];
        const squared = x * x + y * y + z * z;
        if (squared < least && (i !== j || squared > 1e-6)) least = squared;
      }
    });
    return Math.sqrt(least);
  });
}

/**
 * What is drawn of a crystal, in Å: the atoms of `cells` cells along each edge, those on the borders on each of them,
 * and the pairs that are bonded.
 */
function scene(crystal, elements, cells) {
  const edges = lattice(crystal), atoms = [], bonds = [];
  const radius = z => elements[z][2];
  const reach = 2 * BOND * Math.max(...new Set(crystal.species.map(radius)));
  const bonded = crystal.species.length * cells ** 3 <= MOST_BONDED;
  const nearest = bonded ? nearestNeighbours(crystal, edges, reach) : [];
  crystal.fractions.forEach((fraction, i) => {
    const inside = fraction.map(x => x > 1 - BORDER ? x - 1 : x);
    const copies = inside.map(x => Array.from({length: cells + (Math.abs(x) < BORDER)}, (_, k) => k));
    for (const p of copies[0]) for (const q of copies[1]) for (const r of copies[2])
      atoms.push({z: crystal.species[i], at: inSpace(edges, plus(inside, [p, q, r])), nearest: nearest[i]});
  });
  for (let i = 0; bonded && i < atoms.length; i++) for (let j = 0; j < i; j++) {
    const distance = norm(minus(atoms[i].at, atoms[j].at));
    // Only an atom's first shell: large cations would else be joined with each other past their anions.
    if (distance > 0.1 && distance < BOND * (radius(atoms[i].z) + radius(atoms[j].z))
        && distance < SHELL * Math.max(atoms[i].nearest, atoms[j].nearest)) bonds.push([i, j]);
  }
  const corners = Array.from({length: 8}, (_, k) => inSpace(edges, [k & 1, k >> 1 & 1, k >> 2 & 1]));
  const middle = times(cells / 2, corners[7]);
  const extent = Math.max(...corners.map(corner => norm(minus(times(cells, corner), middle))));
  return {edges, atoms, bonds, corners, middle, extent};
}

/** CIF in P1. The page holds lengths and angles to seven digits, coordinates to 1/65536 of an edge. */
function toCif(crystal, name, elements) {
  const numbers = [...crystal.lengths, ...crystal.angles].map(x => +x.toPrecision(7));
  const keys = ["length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma"];
  const atoms = crystal.species.map((z, i) =>
    `${elements[z][0]} ${elements[z][0]}${i} ${crystal.fractions[i].map(x => x.toFixed(5)).join(" ")} 1`);
  return [
    `data_${name.replace(/[^\w.-]/g, "_")}`,
    "# from report.html, rounded; structures.parquet holds the exact crystal",
    "_symmetry_space_group_name_H-M 'P 1'", "_symmetry_Int_Tables_number 1",
    ...keys.map((key, k) => `_cell_${key} ${numbers[k]}`),
    "loop_", "_symmetry_equiv_pos_site_id", "_symmetry_equiv_pos_as_xyz", "1 'x, y, z'",
    "loop_", ...["type_symbol", "label", "fract_x", "fract_y", "fract_z", "occupancy"].map(c => `_atom_site_${c}`),
    ...atoms, "",
  ].join("\n");
}
