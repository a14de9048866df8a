// The page of payrelay: reads GET /overview every two seconds, and acts through /admin.

import { ageSince, Outdated, Problem, request, saveToken, savedToken, serverNow } from "./api.js";
import {
  button, byId, element, keepChildren, keepTexts, onClick, setLevel, setText, showFacts,
} from "./dom.js";
import { age, bytes, counted, milliseconds, number, quantiles, rate } from "./format.js";
import {
  isList, isPaymentOpen, loadList, loadOlder, loadPayment, refreshPayment,
} from "./payments.js";
import { Stage } from "./stage.js";

const POLL = 2_000;
const POLL_MAX = 30_000;
const RATE_SPAN = 10_000;
const POINT_SPAN = 5_000;
const HOUR = 3_600_000;
const LETTERS = 20;
const LETTERS_SPAN = 30_000;
const THEME = "payrelay-theme";
const LATE_S = 60;

// The state of everything

let overview = null;
let lastError = null;
let startedAt = null;
const recent = [];
let points = [];

const isAdmin = () => overview?.access === "admin";

/** What was added in a second, in the last ten seconds; `null` if it is not known yet. */
function recentRate(key) {
  const last = recent.at(-1);
  const first = recent[0];
  if (!last || last === first) return null;
  return ((last[key] - first[key]) * 1000) / (last.at - first.at);
}

function keepTotals() {
  const now = { at: serverNow(), ...overview.totals };
  // The totals begin at zero with payrelay.
  if (startedAt !== overview.started_at) recent.length = 0;
  startedAt = overview.started_at;
  // What is older is from before a pause of the page.
  while (recent.length > 0 && recent[0].at < now.at - RATE_SPAN - POLL) recent.shift();
  recent.push(now);
  if (!overview.pending || now.at - (points.at(-1)?.at ?? 0) < POINT_SPAN) return;
  const { unpublished, unconsumed, undelivered } = overview.pending;
  points = points.filter((point) => point.at > now.at - HOUR);
  points.push({
    ...now,
    unpublished: unpublished.count,
    unconsumed: unconsumed.count,
    undelivered: undelivered.count,
  });
}

function paymentRates() {
  return points.slice(1).map((point, index) => {
    const before = points[index];
    const added = Math.max(0, point.payments - before.payments);
    return { at: point.at, value: (added * 1000) / Math.max(1, point.at - before.at) };
  });
}

const stored = new Stage("stored", ["p50, p99", "queue"]);
const published = new Stage("published", ["p50, p99", "rate"]);
const consumed = new Stage("consumed", ["p50, p99"]);
const delivered = new Stage("delivered", ["rate"]);

function showStages() {
  const { pending, latency, last_minute, queue, publisher, role } = overview;
  const count = last_minute ? counted(last_minute.payments, "payment") : "";
  const minute = count && `${count} in the last minute`;
  const queued = `${number(queue.payments)} of ${number(queue.max)}`;
  const facts = [quantiles(latency.answer), queued];
  stored.show(rate(recentRate("payments")), "", minute, null, facts);
  stored.draw(paymentRates(), "payments a second");
  const waiting = (stage, key, facts) => {
    const { count, oldest_age_s } = pending?.[key] ?? {};
    const isWaiting = count > 0;
    const oldest = isWaiting ? `the oldest for ${age(oldest_age_s)}` : "nothing waits";
    const level = isWaiting && oldest_age_s > LATE_S ? "warn" : null;
    let unit = "";
    if (isWaiting) unit = count === 1 ? "waits" : "wait";
    stage.show(number(count), unit, pending ? oldest : "", level, facts);
    stage.draw(points.map((point) => ({ at: point.at, value: point[key] })), "waiting");
  };
  const isKafka = publisher === "kafka";
  setText(byId("published-to"), isKafka ? "to Kafka" : "in this process");
  // Others consume and deliver the events of an edge.
  const isEdge = role === "edge";
  consumed.panel.hidden = isEdge || !isKafka;
  delivered.panel.hidden = isEdge;
  waiting(published, "unpublished", [quantiles(latency.publish), rate(recentRate("published"))]);
  waiting(consumed, "unconsumed", [quantiles(latency.consume)]);
  waiting(delivered, "undelivered", [rate(recentRate("delivered"))]);
}

const COMPONENTS = {
  publisher: "Publishing",
  consumer: "Consuming",
  database: "The database",
  disk: "The disk",
};

function componentName(name) {
  const channel = name === "slack" ? "default" : name.replace(/^slack:/, "");
  return COMPONENTS[name] ?? `The channel ${channel}`;
}

const WORDS = {
  ready: ["good", "Ready", "Payments are accepted."],
  degraded: ["warn", "Degraded", "Payments are accepted, and something waits."],
  unavailable: ["bad", "Unavailable", "No payment is accepted."],
};
const STATE_WORDS = { rate_limited: "limited by Slack" };
const stateWord = (state) => STATE_WORDS[state] ?? state;

function showState() {
  const [level, word, text] = lastError
    ? ["bad", lastError.word, `${lastError.text}. The numbers are of the last response.`]
    : (WORDS[overview.status] ?? ["bad", overview.status, ""]);
  setLevel(byId("state"), level);
  setText(byId("state-word"), word);
  setText(byId("state-text"), text);
  document.title = level === "good" ? "payrelay" : `${word} – payrelay`;
  const components = Object.entries(overview?.components ?? {});
  keepChildren(
    byId("causes"),
    components.filter(([, { state }]) => state !== "up"),
    ([name, { state }]) => `${name} ${state} ${isAdmin()}`,
    ([name, { state }]) => element("li", {}, element("span"), causeButton(name, state)),
    (item, [name, { state, since, error }]) => {
      const duration = `${stateWord(state)} for ${ageSince(since)}`;
      const why = error ? `: ${error}` : "";
      setText(item.firstChild, `${componentName(name)} is ${duration}${why}`);
    },
  );
}

function causeButton(name, state) {
  if (!isAdmin() || name !== "publisher") return null;
  if (state === "fenced") return button("Publish again…", resumeRelay);
  return button("Try now", () => act("/admin/relay/wake", {}, "The relay tries now."));
}

function showMachine() {
  const { files, disk_full_in_s: full, last_backup, last_audit, started_at, warnings } = overview;
  const month = 30 * 86_400;
  const forecast = full >= month ? ", full in more than 30 d" : `, full in ${age(full)}`;
  const free = files ? bytes(files.disk_free_bytes) + (full === null ? "" : forecast) : "–";
  const size = files && `${bytes(files.database_bytes)}, WAL ${bytes(files.wal_bytes)}`;
  const facts = [
    ["Free on the disk", free],
    ["Database", size ?? "–"],
    ["Last backup", operationText(last_backup, "payrelay backup FILE")],
    ["Last audit", auditText(last_audit)],
    ["Running for", ageSince(started_at)],
  ];
  showFacts(byId("facts"), facts);
  keepTexts(byId("warnings"), warnings.map((warning) => `Warning: ${warning}`));
}

/** A missing record is unknown, `null` is none. */
function operationText(record, command) {
  if (record === undefined) return "unknown: the database does not respond";
  if (record === null) return `none yet: ${command}`;
  return `${ageSince(record.ended_at)} ago, by ${record.origin}`;
}

function auditText(audit) {
  const text = operationText(audit, "payrelay audit");
  if (!audit) return text;
  const scope = audit.file_only ? " of the file alone" : "";
  const result = audit.findings ? `found ${counted(audit.findings, "problem")}` : "clean";
  return `${result}${scope}, ${text}`;
}

function showTopic() {
  const { topic } = overview;
  byId("topic").hidden = !topic;
  setText(byId("topic-name"), topic?.name ?? "");
  const cells = (partition) => {
    const { published_to, consumed_to, duplicates, gaps, inversions } = partition;
    const lag = consumed_to === null ? null : Math.max(0, published_to - consumed_to);
    return [published_to, consumed_to, lag, duplicates, gaps, inversions];
  };
  keepChildren(
    byId("partitions"),
    topic?.partitions ?? [],
    ({ partition }) => partition,
    (partition) => element(
      "tr",
      {},
      element("th", { scope: "row" }, String(partition.partition)),
      ...cells(partition).map(() => element("td", { class: "number" })),
    ),
    (row, partition) => cells(partition).forEach((cell, index) => {
      setText(row.children[index + 1], number(cell));
    }),
  );
}

// Channels

const CHANNEL_LEVELS = { up: "good", rate_limited: "good", unavailable: "warn", paused: "bad" };

const canSkip = ({ state, waiting }) => state === "paused" && waiting > 0;

function channelButtons({ name, state, waiting }) {
  if (!isAdmin()) return [];
  const path = `/admin/channels/${encodeURIComponent(name)}`;
  const resume = button(state === "paused" ? "Resume" : "Try now", () =>
    act(`${path}/resume`, {}, `The channel ${name} tries now.`));
  const skip = button("Skip one…", async () => {
    const answer = await ask({
      title: `Skip the oldest payment of ${name}?`,
      lines: ["The payment becomes a dead letter. The channel then tries the next one, if it may."],
      reason: "required",
      confirm: "Skip",
    });
    const outcome = `The channel ${name} passes over its oldest payment.`;
    if (answer) await act(`${path}/skip`, answer, outcome);
  });
  const pause = button("Pause…", async () => {
    const answer = await ask({
      title: `Pause ${name}?`,
      lines: ["Its payments wait until it is resumed, also after a restart."],
      reason: "optional",
      confirm: "Pause",
    });
    if (answer) await act(`${path}/pause`, answer, `The channel ${name} pauses.`);
  });
  if (canSkip({ state, waiting })) return [resume, skip];
  if (state === "paused") return [resume];
  return state === "unavailable" ? [resume, pause] : [pause];
}

function showChannels() {
  byId("channels").closest("section").hidden = overview.role === "edge";
  keepChildren(
    byId("channels"),
    overview.channels,
    (channel) => `${channel.name} ${channel.state} ${canSkip(channel)} ${isAdmin()}`,
    (channel) => element(
      "li",
      { "data-level": CHANNEL_LEVELS[channel.state] ?? "bad" },
      element("span", { class: "mark", "aria-hidden": "true" }),
      element("span", { class: "title" }, channel.name),
      element("span", { class: "word" }),
      element("span", { class: "grow" }),
      element("span", { class: "actions" }, ...channelButtons(channel)),
    ),
    (item, { state, since, error, waiting, oldest_waiting_s, latency }) => {
      const [, , word, text] = item.children;
      setText(word, state === "up" ? "up" : `${stateWord(state)} for ${ageSince(since)}`);
      const verb = waiting === 1 ? "waits" : "wait";
      const oldest = `${number(waiting)} ${verb}, the oldest for ${age(oldest_waiting_s)}`;
      const waits = waiting > 0 ? oldest : "nothing waits";
      const parts = [error, waits];
      if (latency) {
        const { p50_ms, p99_ms } = latency;
        parts.push(`p50 ${milliseconds(p50_ms)}, p99 ${milliseconds(p99_ms)}`);
      }
      setText(text, parts.filter(Boolean).join(" · "));
    },
  );
}

// Dead letters

let letters = null;
let lettersKey = "";

async function loadLetters() {
  const { count, oldest_at } = overview.pending?.dead_letters ?? {};
  const key = `${count} ${oldest_at} ${Math.floor(Date.now() / LETTERS_SPAN)}`;
  if (!isAdmin() || key === lettersKey) return;
  if (count === 0) letters = [];
  else letters = (await request(`/admin/dead-letters?limit=${LETTERS}`)).dead_letters;
  lettersKey = key;
}

function showLetters() {
  const { count = 0, oldest_age_s } = overview.pending?.dead_letters ?? {};
  setText(byId("letters-count"), number(count));
  const shown = letters?.length ?? 0;
  const rest = isAdmin() && count > shown ? ` The first ${shown} are shown.` : "";
  const action = isAdmin() ? "" : " A token with the access admin shows them.";
  const oldest = `The oldest is ${age(oldest_age_s)} old.`;
  setText(byId("letters-note"), count > 0 ? `${oldest}${rest}${action}` : "There are none.");
  byId("letters-all").hidden = !isAdmin() || count < 2;
  const items = isAdmin() ? (letters ?? []) : [];
  const keyOf = ({ id, count, reason }) => `${id} ${count} ${reason}`;
  keepChildren(byId("letters"), items, keyOf, letterItem, (item, { received_at }) => {
    setText(item.querySelector(".note"), `for ${ageSince(received_at)}`);
  });
}

function letterItem(letter) {
  const { id, payment_id, record, reason, count } = letter;
  const subject = payment_id !== undefined
    ? element("a", { href: `#payment=${payment_id}` }, `payment ${payment_id}`)
    : `record at ${record?.topic}, partition ${record?.partition}, offset ${record?.offset}`;
  const times = count > 1 ? ` (${number(count)} times)` : "";
  return element(
    "li",
    { "data-level": "bad" },
    element("span", { class: "mark", "aria-hidden": "true" }),
    element("span", { class: "title" }, `${id}`),
    element("span", {}, subject),
    element("span", { class: "grow" }, reason + times),
    element("span", { class: "note" }),
    element(
      "span",
      { class: "actions" },
      button("Replay…", () => resolveLetters("replay", id)),
      button("Discard…", () => resolveLetters("discard", id)),
    ),
  );
}

/** First shows what would happen; without an id it acts on all open ones. */
async function resolveLetters(action, id) {
  const path = (dry) => {
    const which = id === undefined ? `${action}?all=true&` : `${id}/${action}?`;
    return `/admin/dead-letters/${which}dry_run=${dry}`;
  };
  const which = id === undefined ? "the open dead letters" : `dead letter ${id}`;
  await orOutcome(async () => {
    const tried = await request(path(true), { method: "POST" });
    const lines = tried.outcomes.map(({ id, outcome }) => `${id}: ${outcome}`);
    if (tried.next) lines.push("More follow: repeat it for those.");
    const isReplay = action === "replay";
    const answer = await ask({
      title: `${isReplay ? "Replay" : "Discard"} ${which}?`,
      lines: lines.length ? lines : ["Nothing is open any more."],
      reason: isReplay ? "optional" : "required",
      confirm: isReplay ? "Replay" : "Discard",
    });
    if (!answer) return;
    const { outcomes } = await request(path(false), { method: "POST", ...answer });
    const shown = outcomes.slice(0, 5).map(({ id, outcome }) => `${id}: ${outcome}`);
    if (outcomes.length > shown.length) shown.push(`and ${outcomes.length - shown.length} more`);
    showOutcome(shown.join(". ") || "Nothing was open any more.");
    lettersKey = "";
    await refresh();
  });
}

// Actions

/** The element stays where it is, without a text: so a screen reader reads a new one. */
function showOutcome(text, isProblem = false) {
  const node = byId("outcome");
  node.classList.toggle("notice", text !== "");
  node.classList.toggle("problem", isProblem);
  setText(node, text);
}

async function orOutcome(action) {
  showOutcome("");
  try {
    await action();
  } catch (problem) {
    if (problem instanceof Outdated) return;
    if (problem.status === 401) askForToken(UNKNOWN_TOKEN);
    else if (problem.status >= 400) showOutcome(`Nothing was done: ${problem.message}.`, true);
    else showOutcome(`It is unknown whether it was done: ${problem.message}. Look first.`, true);
  }
}

const act = (path, options, outcome) => orOutcome(async () => {
  await request(path, { method: "POST", ...options });
  showOutcome(outcome);
  await refresh();
});

async function resumeRelay() {
  const answer = await ask({
    title: "Publish again?",
    lines: ["Another process has published as this node. Make sure that it has stopped."],
    reason: "optional",
    confirm: "Publish",
  });
  const outcome = "The relay publishes again within a second.";
  if (answer) await act("/admin/relay/resume", answer, outcome);
}

/** Asks for a confirmation, and a reason. `null`: the operator does not want it. */
function ask({ title, lines, reason, confirm }) {
  const dialog = byId("dialog");
  if (dialog.open) return Promise.resolve(null);
  const field = byId("reason");
  setText(byId("dialog-title"), title);
  keepTexts(byId("dialog-lines"), lines);
  setText(byId("dialog-confirm"), confirm);
  field.required = reason === "required";
  setText(byId("reason-label"), field.required ? "Reason" : "Reason (optional)");
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "confirmed" ? { reason: field.value.trim() } : null);
    }, { once: true });
  });
}

// Views

/** The view that the address names: `#payment=17`. */
async function route() {
  const [kind, encoded = ""] = location.hash.slice(1).split("=");
  let id = encoded;
  try {
    id = decodeURIComponent(encoded);
  } catch {
    // The address is shown as it is.
  }
  let view = "overview";
  if (id !== "" && kind === "payment") view = "payment";
  if (id !== "" && isList(kind)) view = "payments";
  for (const name of ["overview", "payment", "payments"]) byId(name).hidden = name !== view;
  showOutcome("");
  if (view === "overview") return;
  byId(`${view}-title`).focus();
  const load = () => (view === "payment" ? loadPayment(id, componentError) : loadList(kind, id));
  await orProblem(`${view}-problem`, load);
}

function componentError(name) {
  const { error, state } = overview?.components?.[name] ?? {};
  return error ? `${stateWord(state)}: ${error}` : "";
}

async function orProblem(id, action) {
  setText(byId(id), "");
  try {
    await action();
  } catch (problem) {
    if (problem instanceof Outdated) return;
    if (problem.status === 401) askForToken(UNKNOWN_TOKEN);
    else setText(byId(id), problem.message);
  }
}

const UNKNOWN_TOKEN = "payrelay does not know this token.";

function askForToken(text = "") {
  const isNew = byId("sign-in").hidden;
  clearTimeout(timer);
  saveToken(null);
  overview = null;
  isRouted = false;
  lettersKey = "";
  for (const id of ["overview", "payment", "payments", "search", "forget"]) byId(id).hidden = true;
  byId("state").hidden = true;
  byId("sign-in").hidden = false;
  setText(byId("token-problem"), text);
  if (isNew) byId("token").focus();
}

// The loop

let timer = 0;
let delay = POLL;
let refreshedAt = 0;
let isRefreshing = false;
/** Whether the view of the address is shown. */
let isRouted = false;

function showOverview() {
  setText(byId("node"), overview.node);
  setText(byId("version"), overview.version);
  byId("search").hidden = false;
  byId("state").hidden = false;
  byId("forget").hidden = savedToken() === null;
  showState();
  showStages();
  showChannels();
  showLetters();
  showTopic();
  showMachine();
}

async function load() {
  const lastPoint = points.at(-1)?.at ?? 0;
  if (serverNow() - lastPoint > 3 * POINT_SPAN) {
    const history = await request("/overview/history");
    points = history.points.map((point) => ({ ...point, at: Date.parse(point.at) }));
  }
  overview = await request("/overview");
  keepTotals();
  lastError = null;
  refreshedAt = Date.now();
  showOverview();
  if (!isRouted) {
    isRouted = true;
    performance.mark("shown");
    await route();
  }
  await orProblem("letters-problem", async () => {
    await loadLetters();
    if (overview) showLetters();
  });
  if (isPaymentOpen()) await orProblem("payment-problem", () => refreshPayment(componentError));
}

/** Reads everything once, and plans the next time. */
async function refresh() {
  if (isRefreshing) return;
  isRefreshing = true;
  clearTimeout(timer);
  try {
    await load();
    delay = POLL;
  } catch (problem) {
    if (!(problem instanceof Outdated)) showFailure(problem);
  }
  isRefreshing = false;
  clearTimeout(timer);
  if (!document.hidden && byId("sign-in").hidden) timer = setTimeout(refresh, delay);
}

function showFailure(problem) {
  if (problem.status === 401) return askForToken(savedToken() ? UNKNOWN_TOKEN : "");
  if (problem.status === 403 && savedToken()) return askForToken(problem.message);
  delay = Math.min(delay * 2, POLL_MAX);
  const isFault = !(problem instanceof Problem);
  const [word, text] = problem.status === 0
    ? ["No connection", problem.message]
    : ["No overview", isFault ? `this page has a fault: ${problem.message}` : problem.message];
  lastError = { word, text };
  byId("state").hidden = false;
  showState();
}

function showRefreshed() {
  if (!refreshedAt) return;
  const seconds = Math.floor((Date.now() - refreshedAt) / 1000);
  setText(byId("refreshed"), `Refreshed ${age(seconds)} ago. It pauses while the tab is hidden.`);
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setText(byId("theme"), (theme ?? system) === "dark" ? "Light" : "Dark");
}

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  location.hash = `${byId("kind").value}=${encodeURIComponent(byId("term").value.trim())}`;
});
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  saveToken(byId("token").value.trim());
  byId("token").value = "";
  byId("sign-in").hidden = true;
  byId("theme").focus();
  isRefreshing = false;
  refresh();
});
byId("forget").addEventListener("click", () => askForToken());
byId("theme").addEventListener("click", () => {
  const theme = byId("theme").textContent.toLowerCase();
  localStorage.setItem(THEME, theme);
  setTheme(theme);
});
byId("dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("dialog").close("confirmed");
});
byId("dialog-cancel").addEventListener("click", () => byId("dialog").close());
onClick(byId("replay-all"), () => resolveLetters("replay"));
onClick(byId("discard-all"), () => resolveLetters("discard"));
onClick(byId("older"), () => orProblem("payments-problem", loadOlder));
addEventListener("hashchange", () => overview && route());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (byId("sign-in").hidden) refresh();
});
setTheme(localStorage.getItem(THEME));
setInterval(showRefreshed, 1000);
refresh();
