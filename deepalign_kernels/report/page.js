"use strict";
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = document.querySelector(".theme");
  const setTheme = (name) => {
    root.dataset.theme = name;
    theme.textContent = name === "dark" ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
  };
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", (e) => setTheme(e.matches ? "dark" : "light"));
  theme.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

  const live = document.getElementById("live");
  const short = (v) => (v === null || v === undefined ? "none" : String(Number(v.toPrecision(4))));

  function setUp(figure) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const chart = figure.querySelector(".chart");
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);
    const hide = () => {
      tip.hidden = true;
      if (data.series) chart.querySelector(".cursor").style.visibility = "hidden";
      else chart.querySelector(".ring").setAttribute("width", 0);
    };
    const scale = () => chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
    const place = (x, y, lines) => {
      tip.replaceChildren(...lines.map((text, i) => {
        const line = document.createElement(i ? "div" : "b");
        line.textContent = text;
        return line;
      }));
      tip.hidden = false;
      const box = chart.getBoundingClientRect(), own = figure.getBoundingClientRect();
      const left = box.left - own.left + x * scale(), top = box.top - own.top + y * scale();
      const wide = tip.offsetWidth;
      tip.style.left = `${Math.max(4, Math.min(left > own.width / 2 ? left - wide - 14 : left + 14,
        own.width - wide - 4))}px`;
      tip.style.top = `${top}px`;
    };
    const at = (event) => {
      const box = chart.getBoundingClientRect();
      return [(event.clientX - box.left) / scale(), (event.clientY - box.top) / scale()];
    };
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);

    if (data.series) {
      const [x0, x1, p0, p1] = data.axis;
      const pixel = (x) => p0 + ((x - x0) / (x1 - x0)) * (p1 - p0);
      const visible = () => data.series.filter((s, i) =>
        !chart.querySelector(`[data-series="${i}"]`).hasAttribute("hidden"));
      const known = () => [...new Set(visible().flatMap((s) => s.x))].sort((a, b) => a - b);
      let index = -1;
      const show = (i, say) => {
        const xs = known();
        if (!xs.length) return;
        index = Math.max(0, Math.min(i, xs.length - 1));
        const x = xs[index], lines = [`${data.x}: ${short(x)}`];
        for (const s of visible()) {
          const k = s.x.indexOf(x);
          if (k < 0 || s.y[k] === null) continue;
          const band = s.low.length && s.low[k] !== null
            ? ` [${short(s.low[k])}, ${short(s.high[k])}]` : "";
          lines.push(`${s.name}: ${short(s.y[k])}${band}${s.n.length ? `, n = ${s.n[k]}` : ""}`);
        }
        const cursor = chart.querySelector(".cursor");
        cursor.setAttribute("transform", `translate(${pixel(x)} 0)`);
        cursor.style.visibility = "visible";
        place(pixel(x), 14, lines);
        if (say) live.textContent = lines.join("; ");
      };
      chart.addEventListener("pointermove", (event) => {
        const px = at(event)[0], xs = known();
        let best = 0;
        xs.forEach((x, i) => {
          if (Math.abs(pixel(x) - px) < Math.abs(pixel(xs[best]) - px)) best = i;
        });
        show(best, false);
      });
      chart.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step) { show(index + step, true); event.preventDefault(); }
        if (event.key === "Escape") hide();
      });
      figure.querySelectorAll(".legend button").forEach((button) =>
        button.addEventListener("click", () => {
          const on = button.getAttribute("aria-pressed") !== "true";
          button.setAttribute("aria-pressed", on);
          chart.querySelector(`[data-series="${button.dataset.series}"]`)
            .toggleAttribute("hidden", !on);
        }));
    } else {
      let cell = [0, -1];
      const show = (r, c, say) => {
        cell = [Math.max(0, Math.min(r, data.rows.length - 1)),
          Math.max(0, Math.min(c, data.columns.length - 1))];
        const rect = chart.querySelector(`[data-at="${cell}"]`), ring = chart.querySelector(".ring");
        for (const name of ["x", "y", "width", "height"])
          ring.setAttribute(name, rect.getAttribute(name));
        const value = data.values[cell[0]][cell[1]];
        const lines = [`${data.rows[cell[0]]}, ${data.x}: ${data.columns[cell[1]]}`,
          `${short(value)} ${data.unit}`];
        place(Number(rect.getAttribute("x")), Number(rect.getAttribute("y")), lines);
        if (say) live.textContent = lines.join(": ");
      };
      chart.addEventListener("pointermove", (event) => {
        const rect = event.target.closest("[data-at]");
        if (rect) show(...rect.dataset.at.split(",").map(Number), false);
        else hide();
      });
      chart.addEventListener("keydown", (event) => {
        const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[
          event.key];
        if (step) { show(cell[0] + step[0], cell[1] + step[1], true); event.preventDefault(); }
        if (event.key === "Escape") hide();
      });
    }

    const save = (name, text, type) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    };
    figure.querySelector(".as-csv").addEventListener("click", () => {
      const quote = (t) => (/[",\n]/.test(t) ? `"${t.replaceAll('"', '""')}"` : t);
      const rows = [...figure.querySelectorAll("table tr")].map((row) =>
        [...row.cells].map((c) => quote(c.textContent)).join(","));
      save(`${data.key}.csv`, `${rows.join("\n")}\n`, "text/csv");
    });
    figure.querySelector(".as-svg").addEventListener("click", () => {
      const copy = chart.cloneNode(true), style = document.createElementNS(chart.namespaceURI, "style");
      copy.setAttribute("xmlns", chart.namespaceURI);
      const names = ["paper", "ink", "soft", "rule", "heat", ...Array.from({ length: 8 }, (_, i) => `c${i}`)];
      const now = getComputedStyle(root);
      style.textContent = `svg{${names.map((n) => `--${n}:${now.getPropertyValue(`--${n}`)}`).join(";")};`
        + `background:var(--paper)}[hidden]{display:none}${document.querySelector("style").textContent}`;
      copy.prepend(style);
      save(`${data.key}.svg`, new XMLSerializer().serializeToString(copy), "image/svg+xml");
    });
  }
  document.querySelectorAll("figure[data-key]").forEach(setUp);

  const folded = [...document.querySelectorAll("details.printed:not([open])")];  // on paper nobody unfolds
  window.addEventListener("beforeprint", () => folded.forEach((d) => { d.open = true; }));
  window.addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));
})();
