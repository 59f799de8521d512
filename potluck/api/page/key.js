// The API key: from the address once (what follows # is never sent to anyone), then only in this tab's session.

const NAME = "potluck-key";

export function takeKeyFromAddress() {
  const match = location.hash.match(/^#key=([\x21-\x7e]+)$/);
  if (!match) return false;
  // Out of the address bar and the tab's history before anything else happens.
  history.replaceState(null, "", location.pathname + location.search);
  return setKey(match[1]);
}

export function setKey(text) {
  const key = text.trim();
  // Anything else can't be in a header.
  if (!/^[\x21-\x7e]+$/.test(key)) return false;
  sessionStorage.setItem(NAME, key);
  return true;
}

export function hasKey() {
  return sessionStorage.getItem(NAME) !== null;
}

export function withKey(headers = {}) {
  const key = sessionStorage.getItem(NAME);
  return key === null ? headers : { ...headers, Authorization: `Bearer ${key}` };
}
