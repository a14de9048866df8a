// Requests to payrelay. All paths are relative to this page: a proxy may put a prefix before them.

import { age } from "./format.js";

const TOKEN = "payrelay-token";

/** The token of this tab; `null` without one. */
export const savedToken = () => sessionStorage.getItem(TOKEN);

export function saveToken(token) {
  if (token) sessionStorage.setItem(TOKEN, token);
  else sessionStorage.removeItem(TOKEN);
}

/** The clock of payrelay minus the clock of this browser. */
let clockAhead = 0;

/** The time of payrelay. */
export const serverNow = () => Date.now() + clockAhead;

/** The time since a moment, of payrelay's clock. */
export const ageSince = (text) => age((serverNow() - Date.parse(text)) / 1000);

/** A request that failed: its status, and a sentence. Without a response of payrelay the status is
 *  0: the request may have been executed. */
export class Problem extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** The answer to a request with a token that is no longer that of this tab. */
export class Outdated extends Error {}

/** Ids go up to 2^63 - 1: what a number cannot hold stays as its digits. */
function parse(text) {
  return JSON.parse(text, (_, value, context) => {
    const isRounded = Number.isInteger(value) && !Number.isSafeInteger(value);
    return isRounded && context?.source ? context.source : value;
  });
}

/** The header Date has whole seconds, so a small difference is none. */
function compareClocks(response) {
  const date = Date.parse(response.headers.get("Date") ?? "");
  const ahead = date + 500 - Date.now();
  if (date && Math.abs(ahead - clockAhead) > 1_500) clockAhead = ahead;
}

/** The path begins with a slash, and is below the folder of this page's parent. */
export async function request(path, { method = "GET", reason } = {}) {
  const headers = {};
  const token = savedToken();
  if (token) headers.Authorization = `Bearer ${token}`;
  let body;
  if (reason) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify({ reason });
  }
  let response;
  try {
    const signal = AbortSignal.timeout(15_000);
    response = await fetch(`..${path}`, { method, headers, body, signal, cache: "no-store" });
  } catch {
    throw new Problem(0, "payrelay does not respond");
  }
  compareClocks(response);
  let answer;
  try {
    answer = parse(await response.text());
  } catch {
    throw new Problem(0, `the response (${response.status}) is not of payrelay`);
  }
  if (token !== savedToken()) throw new Outdated();
  if (response.ok) return answer;
  throw new Problem(response.status, answer.detail ?? answer.title);
}
