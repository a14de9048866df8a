// The panel of a stage: a large number, a line, a chart of the last hour, and facts.

import { byId, element, setLevel, setText } from "./dom.js";
import { number } from "./format.js";

const HOUR = 3_600_000;
const SVG = "http://www.w3.org/2000/svg";

function drawChart(svg, values, unit) {
  const end = values.at(-1)?.at ?? 0;
  const most = values.reduce((most, point) => Math.max(most, point.value), 0);
  const x = (point) => (1000 - ((end - point.at) * 1000) / HOUR).toFixed(1);
  const y = (point) => (39 - (point.value * 36) / Math.max(most, 1)).toFixed(1);
  const line = values.map((point, index) => `${index ? "L" : "M"}${x(point)} ${y(point)}`).join("");
  const area = values.length ? `${line}L1000 40L${x(values[0])} 40Z` : "";
  const [areaPath, linePath] = svg.children;
  areaPath.setAttribute("d", area);
  linePath.setAttribute("d", line);
  svg.setAttribute("aria-label", `The last hour: at most ${number(Math.ceil(most))} ${unit}`);
}

/** A stage below the title in its panel. */
export class Stage {
  constructor(id, facts) {
    this.panel = byId(id);
    this.large = element("p", { class: "large" });
    this.second = element("p", { class: "second" });
    this.chart = document.createElementNS(SVG, "svg");
    this.chart.setAttribute("viewBox", "0 0 1000 40");
    this.chart.setAttribute("preserveAspectRatio", "none");
    this.chart.setAttribute("class", "chart");
    this.chart.setAttribute("role", "img");
    for (const name of ["area", "line"]) {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      this.chart.append(path);
    }
    this.facts = facts.map(() => element("dd"));
    const rows = facts.flatMap((name, index) => [element("dt", {}, name), this.facts[index]]);
    this.panel.append(this.large, this.second, this.chart, element("dl", {}, ...rows));
    this.drawnAt = 0;
  }

  show(large, unit, second, level, facts) {
    if (this.shown !== large + unit) {
      this.large.replaceChildren(large, " ", element("small", {}, unit));
      this.shown = large + unit;
    }
    setText(this.second, second);
    setLevel(this.second, level);
    facts.forEach((fact, index) => setText(this.facts[index], fact));
  }

  draw(values, unit) {
    const at = values.at(-1)?.at ?? 0;
    if (at === this.drawnAt) return;
    this.drawnAt = at;
    drawChart(this.chart, values, unit);
  }
}
