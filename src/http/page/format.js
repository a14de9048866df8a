// Numbers and times, as texts.

const plain = new Intl.NumberFormat();

/** Between a number and its unit: a space that does not break the line. */
const SPACE = "\u00a0";

/** A number, or the digits of one that is too large for a number of JavaScript. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  return plain.format(typeof value === "string" ? BigInt(value) : value);
}

/** `1 payment`, `2 payments`. */
export function counted(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** A duration in its two largest units. */
export function age(seconds) {
  const units = [["d", 86_400], ["h", 3_600], ["m", 60], ["s", 1]];
  let rest = Math.max(0, Math.floor(seconds));
  const first = units.findIndex(([, size]) => rest >= size);
  if (first < 0) return `0${SPACE}s`;
  const parts = units.slice(first, first + 2).map(([unit, size]) => {
    const count = Math.floor(rest / size);
    rest -= count * size;
    return [count, unit];
  });
  const shown = parts.filter(([count]) => count > 0);
  return shown.map(([count, unit]) => `${count}${SPACE}${unit}`).join(" ");
}

/** A duration of milliseconds. */
export function milliseconds(value) {
  if (value === undefined || value === null) return "–";
  if (value >= 10_000) return age(value / 1000);
  const isShort = value < 10 && !Number.isInteger(value);
  return `${isShort ? value.toFixed(1) : Math.round(value)}${SPACE}ms`;
}

/** A size in its largest unit. */
export function bytes(value) {
  if (value === null || value === undefined) return "unknown";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  const isShort = size < 10 && unit > 0;
  return `${isShort ? size.toFixed(1) : Math.round(size)}${SPACE}${units[unit]}`;
}

/** A number of things in a second; `null`: not known yet. */
export function rate(perSecond) {
  if (perSecond === null) return "–";
  const isShort = perSecond > 0 && perSecond < 100;
  return `${isShort ? perSecond.toFixed(1) : number(Math.round(perSecond))}/s`;
}

/** Decimals of a currency that has not two (ISO 4217, list one). A browser has other ones. */
const DECIMALS = {
  0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
  3: "BHD IQD JOD KWD LYD OMR TND",
  4: "CLF UYW",
};

/** In the main unit of the currency, as Slack messages show it. */
export function amount(value, currency) {
  const known = Object.entries(DECIMALS).find(([, names]) => names.split(" ").includes(currency));
  const decimals = Number(known?.[0] ?? 2);
  const digits = String(value).padStart(decimals + 1, "0");
  const whole = plain.format(BigInt(digits.slice(0, digits.length - decimals)));
  const separator = plain.format(1.5).replace(/\d/g, "");
  const part = decimals > 0 ? separator + digits.slice(-decimals) : "";
  return `${whole}${part} ${currency}`;
}

/** The median and the 99th percentile of a latency. */
export function quantiles(latency) {
  return latency ? `${milliseconds(latency.p50_ms)}, ${milliseconds(latency.p99_ms)}` : "–";
}
