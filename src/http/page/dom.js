// Elements of the page. All text from outside becomes a text node, never markup.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; a child may be a text. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null));
  return node;
}

/** Changes a text only if it is another one: a selection stays, a screen reader is silent. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A level is a colour and a shape; the style sheet knows them. */
export function setLevel(node, level) {
  if (node.dataset.level === level) return;
  if (level) node.dataset.level = level;
  else delete node.dataset.level;
}

let isActing = false;

/** Runs an action on a click, one at a time: a dialog belongs to one action. If the action removes
 *  the button, the title of its section has the focus. */
export function onClick(node, action) {
  node.addEventListener("click", async () => {
    if (isActing) return;
    const title = node.closest("[data-section]")?.querySelector("[tabindex='-1']");
    isActing = true;
    node.disabled = true;
    try {
      await action();
    } finally {
      isActing = false;
      node.disabled = false;
    }
    if (document.activeElement === document.body) (node.checkVisibility() ? node : title)?.focus();
  });
}

/** A button with an action. */
export function button(label, action) {
  const node = element("button", { type: "button" }, label);
  onClick(node, action);
  return node;
}

/** Keeps one child for each item, in order, so that focus survives an update. */
export function keepChildren(parent, items, keyOf, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const keys = items.map((item) => String(keyOf(item)));
  // The others first: a child that is moved loses the focus.
  for (const [key, child] of known) if (!keys.includes(key)) child.remove();
  items.forEach((item, index) => {
    const key = keys[index];
    let child = known.get(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    const place = parent.children[index] ?? null;
    if (place !== child) parent.insertBefore(child, place);
    update?.(child, item);
  });
}

/** Keeps a list item for each text. */
export function keepTexts(parent, texts) {
  keepChildren(parent, texts, (text) => text, (text) => element("li", {}, text));
}

/** A list of names and values; a value is a text or an element. */
export function showFacts(list, facts) {
  const names = [...list.querySelectorAll("dt")].map((node) => node.textContent).join();
  if (names !== facts.map(([name]) => name).join()) {
    list.replaceChildren(...facts.flatMap(([name]) => [element("dt", {}, name), element("dd")]));
  }
  list.querySelectorAll("dd").forEach((node, index) => {
    const value = facts[index][1];
    if (!(value instanceof Node)) setText(node, value);
    else if (!node.firstChild?.isEqualNode(value)) node.replaceChildren(value);
  });
}

/** In the time zone of the reader; the title has it in UTC. */
export function time(text, fraction) {
  const options = {
    year: "numeric",
    month: "short",
    day: "numeric",
    hour: "numeric",
    minute: "2-digit",
    second: "2-digit",
    fractionalSecondDigits: fraction,
  };
  const local = new Date(text).toLocaleString(undefined, options);
  return element("time", { datetime: text, title: text }, local);
}
