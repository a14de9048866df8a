// One payment with its timeline, and lists of payments.

import { request, serverNow } from "./api.js";
import { byId, element, setText, showFacts, time } from "./dom.js";
import { age, amount, counted, milliseconds, number } from "./format.js";

/** The payment of the view, and the request that may still change the view. */
let shown = null;
let current = 0;

/** The steps until the first that is still open: name, time, detail. */
function stages({ event, notification, executed_at }, errorOf) {
  const purged = "its event and its delivery were purged, long after the delivery";
  if (!event) return [["Stored", executed_at, purged]];
  const steps = [["Stored", executed_at, `with its event ${event.id}`]];
  if (!event.published_at) {
    const rejection = `the broker rejects it, a dead letter: ${event.rejection}`;
    return [...steps, ["Published", null, event.rejection ? rejection : errorOf("publisher")]];
  }
  const place = `partition ${event.partition}, offset ${number(event.offset)}`;
  steps.push(["Published", event.published_at, event.offset === null ? "in this process" : place]);
  const consumedAt = notification?.consumed_at;
  if (!consumedAt) return [...steps, ["Consumed", null, errorOf("consumer")]];
  steps.push(["Consumed", consumedAt, ""]);
  return [...steps, deliveredStage(notification)];
}

function deliveredStage({ channel, attempts, delivered_at, last_error, status }) {
  const ends = { DEAD: "a dead letter", DISCARDED: "discarded by an operator" };
  const parts = [`channel ${channel}`];
  if (attempts > 0) parts.push(counted(attempts, "attempt"));
  if (ends[status]) parts.push(ends[status]);
  const error = !delivered_at && last_error ? `: ${last_error}` : "";
  return ["Delivered", delivered_at, parts.join(", ") + error];
}

function showTimeline(payment, errorOf) {
  let before = payment.executed_at;
  const items = stages(payment, errorOf).map(([name, at, detail], index) => {
    const end = at ? Date.parse(at) : serverNow();
    const since = Math.max(0, end - Date.parse(before));
    const after = at ? `after ${milliseconds(since)}` : `waits for ${age(since / 1000)}`;
    before = at ?? before;
    return element(
      "li",
      { "data-level": at ? "good" : "open" },
      element("span", { class: "mark", "aria-hidden": "true" }),
      element("strong", {}, at ? name : `Not ${name.toLowerCase()} yet`),
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
  const payment = await request(`/payments/${encodeURIComponent(id)}`);
  if (mine === current) showPayment(payment, errorOf);
}

/** Looks again, unless the payment is delivered or discarded. */
export async function refreshPayment(errorOf) {
  const isDone = ["DELIVERED", "DISCARDED"].includes(shown?.notification?.status);
  if (!shown?.event || isDone || byId("payment").hidden) return;
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
  setText(byId("payments-title"), `${title} ${id}`);
  byId("payments-rows").replaceChildren();
  olderPath = path;
  await loadOlder();
}

export async function loadOlder() {
  const mine = ++current;
  byId("older").hidden = true;
  const { payments, next } = await request(olderPath);
  if (mine !== current) return;
  const rows = byId("payments-rows");
  rows.append(...payments.map(row));
  olderPath = next ?? null;
  byId("older").hidden = olderPath === null;
  const isEmpty = rows.children.length === 0 && olderPath === null;
  setText(byId("payments-note"), isEmpty ? "There are none." : "");
}
