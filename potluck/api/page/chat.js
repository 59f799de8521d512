import { hasKey, setKey, takeKeyFromAddress, withKey } from "./key.js";
import { events } from "./sse.js";
import { render } from "./text.js";

const POLL_MS = 3000;
const TEMPERATURE = 0.7; // as in `potluck chat`: a small model rambles at the API's default of 1
const $ = (id) => document.getElementById(id);
const log = $("log"), empty = $("empty"), input = $("input"), form = $("form"), send = $("send"), stop = $("stop");

let model = null;
let messages = [];
let running = null; // AbortController of the answer under way
let hasSendFailed = false;
let pollTimer = 0;

takeKeyFromAddress();

// The ring's state.

async function poll() {
  clearTimeout(pollTimer);
  let state = "unreachable", reason = "";
  try {
    const response = await fetch("/health", { cache: "no-store", headers: withKey() });
    const body = await response.json();
    [state, reason, model] = [body.status, body.reason ?? "", body.model ?? null];
    // Without the right key it says less.
    if (model === null) state = "locked";
    $("model").textContent = model ?? "…";
    document.title = model === null ? "Potluck" : `${model} – Potluck`;
  } catch {
    reason = "Potluck does not answer. Is it still running?";
  }
  const shown = $("state");
  // The reason too: what was first seen of a fall may be a symptom, and its cause known a moment later.
  if (shown.dataset.state !== state || shown.title !== reason) {
    shown.dataset.state = state;
    shown.textContent = state;
    if (["ready", "locked"].includes(state) && !hasSendFailed) hideError();
    if (state === "locked" && hasKey()) showError("This key is not right, or no longer. Its owner sees it with: potluck key");
    if (state === "down") showError(`The ring is down: ${reason}. Restart Potluck to go on.`);
    if (state === "unreachable") showError(`${reason} Start it again with “potluck up”; this page reconnects.`);
  }
  shown.title = reason;
  update();
  pollTimer = setTimeout(poll, POLL_MS);
}

function update() {
  const isLocked = $("state").dataset.state === "locked";
  $("unlock").hidden = !isLocked;
  form.hidden = isLocked;
  send.hidden = running !== null;
  stop.hidden = running === null;
  send.disabled = $("state").dataset.state !== "ready" || !input.value.trim();
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = false;
}

function hideError() {
  $("error").hidden = true;
}

// The conversation.

function addMessage(role, text) {
  empty.remove();
  const article = document.createElement("article");
  article.className = role;
  const heading = document.createElement("h2");
  heading.textContent = role === "user" ? "You" : model;
  const body = document.createElement("div");
  body.className = "text";
  render(body, text);
  article.append(heading, body);
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return article;
}

function addFacts(article, facts) {
  const line = document.createElement("p");
  line.className = "facts";
  line.textContent = facts;
  article.append(line);
}

async function ask(text) {
  hideError();
  hasSendFailed = false;
  const conversation = messages; // a new chat may begin before this answer ends
  conversation.push({ role: "user", content: text });
  const question = addMessage("user", text);
  const article = addMessage("assistant", "");
  article.classList.add("busy");
  running = new AbortController();
  update();
  const answer = { text: "", tokens: 0, startedMs: performance.now(), firstMs: 0, lastMs: 0, reason: null };
  let problem = null;
  try {
    await stream(conversation, answer, article, running.signal);
  } catch (error) {
    if (error.name !== "AbortError") problem = error.hint ?? "The connection broke off. Try again.";
  }
  const isStopped = running.signal.aborted;
  running = null;
  article.classList.remove("busy");
  render(article.querySelector(".text"), answer.text);
  if (answer.text) conversation.push({ role: "assistant", content: answer.text });
  if (problem !== null) fail(problem, conversation, question, article, answer, text);
  else addFacts(article, factsOf(answer, isStopped));
  $("announce").textContent = conversation === messages ? answer.text : "";
  update();
  input.focus();
}

function fail(problem, conversation, question, article, answer, text) {
  hasSendFailed = true;
  showError(problem);
  if (answer.text) {
    addFacts(article, "broken off");
    return;
  }
  // Nothing was said: give the question back, so that it can be sent again.
  conversation.pop();
  question.remove();
  article.remove();
  if (!input.value) input.value = text;
}

async function stream(conversation, answer, article, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: withKey({ "Content-Type": "application/json" }),
    body: JSON.stringify({
      model,
      messages: conversation,
      temperature: TEMPERATURE,
      stream: true,
      stream_options: { include_usage: true },
    }),
    signal,
  });
  if (!response.ok) throw failure((await response.json().catch(() => ({}))).error, response.status);
  const body = article.querySelector(".text");
  let isDrawing = false;
  for await (const { event, data } of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (event === "error" || chunk.error) throw failure(chunk.error, 0);
    if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    if (!choice) continue;
    answer.reason = choice.finish_reason ?? answer.reason;
    if (!choice.delta.content) continue;
    answer.lastMs = performance.now();
    answer.firstMs ||= answer.lastMs;
    answer.text += choice.delta.content;
    if (!isDrawing) {
      // At most once a frame, however fast the tokens come.
      isDrawing = true;
      requestAnimationFrame(() => {
        isDrawing = false;
        const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
        render(body, answer.text);
        if (isAtEnd) log.scrollTop = log.scrollHeight;
      });
    }
  }
  throw failure(null, 0);
}

function failure(error, status) {
  const message = error?.message ?? "The answer broke off";
  const advice = {
    429: "Others are being served; try again in a moment.",
    503: "Wait until the ring is ready, or restart Potluck.",
    400: "Change the message, or start a new chat.",
    401: "Enter the key that it has now.",
  }[status] ?? "Try again.";
  return Object.assign(new Error(message), { hint: `${message}. ${advice}`.replace(/\.\. /, ". ") });
}

function factsOf(answer, isStopped) {
  const facts = [];
  const seconds = (answer.lastMs - answer.firstMs) / 1000;
  if (answer.tokens > 1 && seconds > 0) facts.push(`${((answer.tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (answer.firstMs) facts.push(`first token after ${((answer.firstMs - answer.startedMs) / 1000).toFixed(2)} s`);
  if (answer.tokens) facts.push(`${answer.tokens} tokens`);
  if (isStopped) facts.push("stopped");
  if (answer.reason === "length") facts.push("cut at the length limit");
  return facts.join(" · ") || "no text";
}

// What the user does.

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (running || !text || send.disabled) return;
  input.value = "";
  resize();
  ask(text);
});

input.addEventListener("keydown", (event) => {
  // Not while an input method composes a word.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

function resize() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

input.addEventListener("input", () => {
  resize();
  update();
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  hasSendFailed = false;
  $("state").dataset.state = "unknown"; // what is then found is shown, also if it is what was shown before
  if (!setKey($("key").value)) showError("That is not a key.");
  else poll();
  $("key").value = "";
});

window.addEventListener("hashchange", () => {
  if (takeKeyFromAddress()) poll();
});

stop.addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren(empty);
  hideError();
  input.focus();
});

poll();
