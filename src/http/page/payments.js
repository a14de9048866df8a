// One payment with its timeline, and lists of payments.

import { request, serverNow } from "./api.js";
import { byId, element, setText, showFacts, time } from "./dom.js";
import { age, amount, counted, milliseconds, number } from "./format.js";

/** The payment of the view, and the request that may still change the view. */
let shown = null;
let current = 0;

/** The steps until the first that is still open: name, time, detail, whether it never comes. */
function stages({ event, notification, executed_at }, errorOf) {
  const purged = "its event was purged, long after the end of its way";
  if (!event) return [["Stored", executed_at, purged]];
  const steps = [["Stored", executed_at, `with its event ${event.id}`]];
  if (!event.published_at) {
    const rejection = `the broker rejects it, a dead letter: ${event.rejection}`;
    return [...steps, ["Published", null, event.rejection ? rejection : errorOf("publisher")]];
  }
  const place = `partition ${event.partition}, offset ${number(event.offset)}`;
  steps.push(["Published", event.published_at, event.offset === null ? "in this process" : place]);
  // Others deliver the event of an edge.
  if (!notification) return steps;
  const consumedAt = notification.consumed_at;
  if (!consumedAt) return [...steps, ["Consumed", null, errorOf("consumer")]];
  steps.push(["Consumed", consumedAt, ""]);
  return [...steps, deliveredStage(notification, errorOf)];
}

function deliveredStage({ channel, attempts, delivered_at, last_error, status }, errorOf) {
  const parts = [`channel ${channel}`];
  if (attempts > 0) parts.push(counted(attempts, "attempt"));
  if (status === "DEAD") parts.push("a dead letter");
  if (status === "DISCARDED") parts.push("discarded by an operator");
  const why = last_error ?? errorOf(channel === "default" ? "slack" : `slack:${channel}`);
  const detail = parts.join(", ") + (!delivered_at && why ? `: ${why}` : "");
  return ["Delivered", delivered_at, detail, status === "DISCARDED"];
}

function showTimeline(payment, errorOf) {
  let before = payment.executed_at;
  const items = stages(payment, errorOf).map(([name, at, detail, isNever], index) => {
    const end = at ? Date.parse(at) : serverNow();
    const since = Math.max(0, end - Date.parse(before));
    const waits = isNever ? "" : `waits for ${age(since / 1000)}`;
    const after = at ? `after ${milliseconds(since)}` : waits;
    const missing = isNever ? `Not ${name.toLowerCase()}` : `Not ${name.toLowerCase()} yet`;
    before = at ?? before;
    return element(
      "li",
      { "data-level": at ? "good" : "open" },
      element("span", { class: "mark", "aria-hidden": "true" }),
      element("strong", {}, at ? name : missing),
      " ",
      at ? time(at, 3) : null,
      element("p", {}, [index > 0 ? after : "", detail].filter(Boolean).join(" · ")),
    );
  });
  byId("timeline").replaceChildren(...items);
}

function showPayment(payment, errorOf) {
  const { user_id, reservation_id, status, failure, paid_by, executed_at, event } = payment;
  const link = (kind, value) => element("a", { href: `#${kind}=${value}` }, `${value}`);
  const facts = [
    ["Status", failure ? `${status}: ${failure}` : status],
    ["Amount", amount(payment.amount, payment.currency)],
    ["User", link("user", user_id)],
    ["Reservation", link("reservation", reservation_id)],
    ["Time", time(executed_at)],
  ];
  if (paid_by) facts.push(["Paid by", link("payment", paid_by)]);
  if (event?.trace_id) facts.push(["Trace", link("trace", event.trace_id)]);
  showFacts(byId("payment-facts"), facts);
  showTimeline(payment, errorOf);
  shown = payment;
}

/** Shows a payment; `errorOf` says why a component does not work. */
export async function loadPayment(id, errorOf) {
  const mine = ++current;
  shown = null;
  byId("payment-facts").replaceChildren();
  byId("timeline").replaceChildren();
  setText(byId("payment-title"), `Payment ${id}`);
  let payment;
  try {
    payment = await request(`/payments/${encodeURIComponent(id)}`);
  } catch (problem) {
    // Another view is shown by now.
    if (mine !== current) return;
    throw problem;
  }
  if (mine === current) showPayment(payment, errorOf);
}

/** Whether the shown payment may still change. */
export function isPaymentOpen() {
  const isDone = ["DELIVERED", "DISCARDED"].includes(shown?.notification?.status);
  return Boolean(shown?.event) && !isDone && !byId("payment").hidden;
}

/** Looks at it again. */
export async function refreshPayment(errorOf) {
  const mine = current;
  const payment = await request(`/payments/${shown.id}`);
  if (mine === current) showPayment(payment, errorOf);
}

const LISTS = {
  user: (id) => ["Payments of user", `/users/${id}/payment-history`],
  reservation: (id) => ["Payments of reservation", `/payments?reservation_id=${id}`],
  trace: (id) => ["Payments of trace", `/payments?trace_id=${id}`],
};

let olderPath = null;

/** Whether a view is a list of payments. */
export const isList = (kind) => Object.hasOwn(LISTS, kind);

function row(payment) {
  const { id, executed_at, status, failure, currency, user_id, reservation_id } = payment;
  const price = amount(payment.amount, currency);
  return element(
    "tr",
    {},
    element("td", {}, element("a", { href: `#payment=${id}` }, `${id}`)),
    element("td", {}, time(executed_at)),
    element("td", {}, failure ? `${status}: ${failure}` : status),
    element("td", { class: "number" }, price),
    element("td", {}, `${user_id}`),
    element("td", {}, `${reservation_id}`),
  );
}

/** Shows the payments of a user, a reservation or a trace. */
export async function loadList(kind, id) {
  const [title, path] = LISTS[kind](encodeURIComponent(id));
  setText(byId("payments-note"), "");
  setText(byId("payments-title"), `${title} ${id}`);
  byId("payments-rows").replaceChildren();
  olderPath = path;
  await loadOlder();
}

/** Adds the next page. If that fails, it can be tried again. */
export async function loadOlder() {
  const mine = ++current;
  byId("older").hidden = true;
  let page;
  try {
    page = await request(olderPath);
  } catch (problem) {
    if (mine !== current) return;
    byId("older").hidden = false;
    throw problem;
  }
  if (mine !== current) return;
  const { payments, next } = page;
  const rows = byId("payments-rows");
  rows.append(...payments.map(row));
  olderPath = next ?? null;
  byId("older").hidden = olderPath === null;
  const none = olderPath === null ? "There are none." : "There are none among the newest events.";
  setText(byId("payments-note"), rows.children.length === 0 ? none : "");
}
