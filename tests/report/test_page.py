"""The page in a real browser: its table sorts and filters, its crystals turn, and nothing of a stranger's is run."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.protocols import PROTOCOLS
from jaxcrystal.evaluation.table import Provenance, describe
from jaxcrystal.reader.reading import read
from jaxcrystal.reader.rows import Row
from jaxcrystal.report import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on the path")

HOSTILE = "</script><img src=x onerror=console.log(1)><b>"
SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
CAESIUM = Structure(Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
BLANK = 0  #: what stands for a picture of nothing
COPIES = 500  #: of each crystal: more rows than a screen shows


def visit(folder, page):
    """The page as the browser leaves it, and what it told its console."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --enable-logging=stderr --window-size=1200,900"
    command = [BROWSER, *options.split(), f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    cifs = [str(CifWriter(SALT)), str(CifWriter(CAESIUM)), HOSTILE]
    pd.DataFrame({"cif": cifs}).to_csv(folder / "s.csv")
    table = describe(read(folder / "s.csv").rows, PROTOCOLS["cdvae"])
    table = pd.concat([table] * COPIES, ignore_index=True)
    good = table["outcome"].eq("ok").to_numpy()
    table = table.assign(
        id=[HOSTILE, *map(str, range(1, 3 * COPIES))],
        group=pd.array([0] * len(table), dtype="Int64"),
        unique=good,
        relaxation="converged",
        relaxation_reason="",
        converged=True,
        energy_per_atom=-1.0,
        rmsd=0.1,
        volume_change=0.0,
        e_above_hull=np.where(good, np.linspace(0.5, -0.2, len(table)), np.nan),
        relaxed_cif=str(CifWriter(CAESIUM)),
        known_as=None,
        train_nearest=HOSTILE,
    )
    versions = {HOSTILE: HOSTILE, "samples": f"{HOSTILE} sha256:0"}
    provenance = Provenance("cdvae", versions, HOSTILE, HOSTILE)
    known = [Row(HOSTILE, 0, "ok", "", Crystal.from_structure(SALT), "")]
    results.write(folder, table, metrics_from_table(table, provenance), provenance, known=known)
    return report.write(folder)


def use(page, folder, script):
    """What a script finds that uses the page as a reader would; it may `await soon()` for pictures to be drawn."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text, count=1)
    # Under virtual time a browser without a screen draws few frames, or none.
    text = text.replace("<head>", "<head><script>window.requestAnimationFrame = paint => setTimeout(paint)</script>", 1)
    driver = """<pre id="told"></pre><script>
    const soon = () => new Promise(done => setTimeout(done, 100)), found = {};
    const all = query => [...document.querySelectorAll(query)];
    const picture = canvas => {
      const copy = Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height});
      const pen = copy.getContext("2d", {willReadFrequently: true});
      pen.drawImage(canvas, 0, 0);
      const pixels = pen.getImageData(0, 0, copy.width, copy.height).data;
      return pixels.reduce((hash, value, i) => value ? (hash * 31 + value * (i % 9973)) | 0 : hash, 0);
    };
    const column = k => all("#body tr[data-place]").map(tr => tr.children[k].textContent);
    const type = (element, value) => { element.value = value; element.dispatchEvent(new Event("input")); };
    (async () => { await soon(); SCRIPT
      const bytes = unescape(encodeURIComponent(JSON.stringify(found)));
      document.getElementById("told").textContent = btoa(bytes) + "#"; })();
    </script></body>"""
    changed = folder / "used.html"
    changed.write_text(text.replace("</body>", driver.replace("SCRIPT", script)), encoding="utf-8")
    left, console = visit(folder, changed)
    assert not console
    return json.loads(base64.b64decode(re.search(r'<pre id="told">(.*?)#</pre>', left)[1]))


def test_without_fingerprints_only_the_same_crystal_is_shown_beside(page, tmp_path):
    """As `evaluate --train` leaves it: the nearest training crystal costs more, and is there only on demand."""
    found = results.read(page.parent)
    same = ["salt", *[None] * (len(found.table) - 1)]
    table = found.table.drop(columns="train_nearest").assign(known_as=same)
    known = [Row("salt", 0, "ok", "", Crystal.from_structure(SALT), "")]
    results.write(tmp_path, table, found.metrics, Provenance("cdvae", {}), known=known)
    seen = use(
        report.write(tmp_path),
        tmp_path,
        """
        const facts = () => all("#own .facts dt, #own .facts dd").map(x => x.textContent).join("|");
        document.querySelector("#body tr[data-place='0']").click(); await soon();
        found.shown = !document.getElementById("other").hidden;
        found.title = document.querySelector("#other .title").textContent;
        found.other = all("#other .facts dd").slice(0, 2).map(dd => dd.textContent);
        found.facts = facts();
        document.getElementById("next").click(); await soon();
        found.hidden = document.getElementById("other").hidden; found.next = facts();
        """,
    )
    assert seen["shown"] and seen["title"] == "The same crystal in the training set"
    assert seen["other"] == ["salt", "the same crystal (StructureMatcher)"] and "training set" not in seen["facts"]
    assert seen["hidden"] and "training set|no crystal of it matches" in seen["next"]


def test_the_page_opens_without_a_word_on_the_console(page, tmp_path):
    left, console = visit(tmp_path, page)
    assert not console
    assert left.count("data-place=") > 10  # its own policy lets its own script fill the table
    assert "<img" not in left and "1,500 of 1,500" in left


def test_the_table_sorts_filters_and_draws_only_what_is_seen(page, tmp_path):
    found = use(
        page,
        tmp_path,
        """
        const heading = all("#head th")[3];
        found.heading = heading.textContent;
        found.first = column(0)[0];
        found.drawn = all("#body tr").length;
        heading.querySelector("button").click(); found.up = column(3).slice(0, 3); found.sorted = heading.ariaSort;
        heading.querySelector("button").click(); found.down = column(3).slice(0, 3);
        const rows = document.getElementById("rows");
        rows.scrollTop = 1e9;
        for (let i = 0; i < 50 && column(3).pop() !== ""; i++) await soon();  // its event comes with a frame
        found.last = column(3).pop(); found.drawn_at_end = all("#body tr").length;
        type(document.getElementById("filter"), "Cs"); found.formulas = [...new Set(column(1))];
        type(document.getElementById("filter"), "cs"); found.letters = [...new Set(column(1))];
        type(document.getElementById("filter"), "");
        const status = document.getElementById("status");
        status.value = "cif_error"; status.onchange(); found.failed = [...new Set(column(2))];
        status.value = ""; status.onchange();
        document.querySelector("#body button").focus();
        const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        press("ArrowDown"); press("ArrowDown"); found.walked = document.activeElement.closest("tr").dataset.place;
        press("End"); found.end = document.activeElement.closest("tr").dataset.place;
        document.querySelector("[data-element=Na]").onclick(); found.chosen = document.getElementById("filter").value;
        """,
    )
    assert found["heading"] == "above hull, eV/atom" and found["first"] == HOSTILE
    assert found["drawn"] < 60 and found["drawn_at_end"] < 60
    assert found["sorted"] == "ascending" and found["up"][0] == "−0.200" and found["down"][0] == "0.500"
    assert found["up"] == sorted(found["up"], reverse=True)  # of numbers below 0, by their text
    assert found["last"] == ""  # no value: last, whichever way
    assert found["formulas"] == ["CsCl"] and found["letters"] == ["CsCl"]
    assert found["failed"] == ["cif_error"]
    assert found["walked"] == "2" and found["end"] == str(3 * COPIES - 1) and found["chosen"] == "Na"


def test_a_crystal_opens_turns_zooms_and_changes_to_its_relaxed_state(page, tmp_path):
    found = use(
        page,
        tmp_path,
        """
        const [own, other] = all("dialog canvas");
        document.querySelector("#body tr[data-place='0']").click(); await soon();
        const dialog = document.getElementById("viewer"), shots = () => [picture(own), picture(other)];
        found.open = dialog.open; found.name = document.getElementById("name").textContent;
        found.key = all("#own .key li").map(li => li.textContent);
        found.which = document.getElementById("which").textContent;
        found.near = document.querySelector("#other .facts dd").textContent;
        found.relaxed = shots();
        const facts = () => all("#own .facts dt").map(dt => dt.textContent).slice(0, 2);
        found.facts = facts();
        document.getElementById("sampled").click(); await soon(); found.sampled = shots();
        found.facts_sampled = facts();
        found.key_sampled = all("#own .key li").map(li => li.textContent);
        own.setPointerCapture = () => {};
        const finger = (type, id, x, y) =>
          own.dispatchEvent(new PointerEvent(`pointer${type}`, {pointerId: id, clientX: x, clientY: y}));
        finger("down", 1, 100, 100); finger("move", 1, 160, 120); finger("up", 1, 160, 120);
        await soon(); found.dragged = shots();
        finger("move", 1, 300, 300); await soon(); found.released = shots();
        own.dispatchEvent(new WheelEvent("wheel", {deltaY: -300, cancelable: true}));
        await soon(); found.zoomed = shots();
        own.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
        await soon(); found.turned = shots();
        own.dispatchEvent(new KeyboardEvent("keydown", {key: "0"})); await soon(); found.reset = shots();
        finger("down", 1, 100, 100); finger("down", 2, 200, 100); finger("move", 2, 260, 140);
        finger("up", 1, 0, 0); finger("up", 2, 0, 0); await soon(); found.pinched = shots();
        own.dispatchEvent(new MouseEvent("dblclick")); await soon(); found.reset_again = shots();
        document.getElementById("cells").click(); await soon(); found.cells = shots();
        const read = crystals.read(views[0][0]);
        found.crystal = [read.lengths, read.species, read.fractions];
        found.bonds = scene(read, elements, 1).bonds.length; found.atoms = scene(read, elements, 1).atoms.length;
        found.volume = volume(lattice(read)); found.cif = toCif(read, "a b", elements);
        document.getElementById("next").click(); found.next = document.getElementById("name").textContent;
        document.getElementById("next").click(); found.none = document.querySelector("#own .none").textContent;
        document.getElementById("close").click(); found.closed = !dialog.open;
        document.querySelector("figure button").click();
        found.figure = document.getElementById("place").textContent;
        """,
    )
    assert found["open"] and found["closed"] and found["name"] == "NaCl" and found["which"] == f"no. {HOSTILE}"
    assert found["near"] == HOSTILE
    assert found["key"] == ["Cs 1", "Cl 1"] and found["key_sampled"] == ["Na 4", "Cl 4"]
    assert len({BLANK, *found["relaxed"]}) == 3  # both pictures show something, and not the same
    for k in (0, 1):  # both turn together
        steps = [found[name][k] for name in ("sampled", "dragged", "zoomed", "turned", "pinched", "cells")]
        assert len(set(steps)) == len(steps)
        assert found["dragged"][k] == found["released"][k]
        assert found["reset"][k] == found["reset_again"][k] == found["sampled"][k]
    assert found["relaxed"][0] != found["sampled"][0]
    assert found["facts"] == ["above hull, eV/atom", "space group (as sampled)"]
    assert found["facts_sampled"] == ["above hull, eV/atom (relaxed)", "space group"]
    crystal = Crystal.from_structure(SALT)
    lengths, species, fractions = found["crystal"]
    assert lengths == pytest.approx(list(crystal.lengths)) and species == list(crystal.species)
    assert np.allclose(fractions, crystal.frac_coords)
    assert found["atoms"] == 27 and found["bonds"] == 54 and found["volume"] == pytest.approx(5.69**3)
    saved = Structure.from_str(found["cif"], fmt="cif")
    assert found["cif"].startswith("data_a_b\n") and saved.composition == SALT.composition
    assert saved.lattice.abc == pytest.approx(SALT.lattice.abc)
    assert found["next"] == "CsCl" and "no crystal to draw" in found["none"]
    assert found["figure"] == "1 of 6"
