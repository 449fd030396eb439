// SPDX-License-Identifier: Apache-2.0
// The page of `hourllava serve`: the server's videos, one of them to look at, and a conversation about it.
// What a server, a file or a model says becomes text of the page, never markup.

const ROUTES = {
  models: "GET /v1/models",
  chat: "POST /v1/chat/completions",
  memories: "GET /v1/memories",
  add: "POST /v1/memories",
  upload: "PUT /v1/memories/{name}",
  remove: "DELETE /v1/memories/{name}",
  halt: "POST /v1/memories/{name}/stop",
  picture: "GET /v1/memories/{name}/picture",
  video: "GET /v1/memories/{name}/video",
};
const EXAMPLES = 'For example "Which colour was the star?", "When did the star appear?", "Which scene came first?"';
const KEY = "hourllava_key";

const byId = (id) => document.getElementById(id);
const part = (root, name) => root.querySelector(`[data-part="${name}"]`);
const copyOf = (template) => byId(template).content.firstElementChild.cloneNode(true);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

function clock(seconds, hours = seconds >= 3600) {
  const [hour, minute, second] = [seconds / 3600, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hour}:${two(minute)}:${two(second)}` : `${minute}:${two(second)}`;
}

// Talking to the server

function address(route, name = "", query = {}) {
  const path = ROUTES[route].split(" ")[1].replace("{name}", () => encodeURIComponent(name));
  const url = new URL(path.slice(1), document.baseURI); // also right behind a proxy that adds a prefix
  url.search = new URLSearchParams(query);
  return url.href;
}

async function refusalOf(response) {
  const [body, later] = [await response.text(), response.headers.get("Retry-After")];
  let words = body.trim().slice(0, 1000) || `The server answered with status ${response.status}.`;
  try {
    words = JSON.parse(body).error.message;
  } catch {
    // Not the server's way to say it: a proxy in between has words of its own.
  }
  return Object.assign(new Error(later ? `${words} (Try again in ${later} s.)` : words), { status: response.status });
}

/** Calls `send`, which takes headers and gives a Response, until it is not refused for want of a key. */
async function withKey(send) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(key ? { Authorization: `Bearer ${key}` } : {});
    if (response.ok) return response;
    const refusal = await refusalOf(response);
    if (response.status !== 401) throw refusal;
    const given = sessionStorage.getItem(KEY) !== key; // while this request was under way
    if (!given && !(await askForKey(refusal.message))) throw refusal;
  }
}

let keyAsked = null; // requests that are refused at once share one dialog
function askForKey(why) {
  byId("key-error").textContent = why;
  keyAsked ??= dialog("key-dialog").then((choice) => {
    keyAsked = null;
    if (choice) sessionStorage.setItem(KEY, byId("key").value);
    byId("key").value = "";
    setCookie();
    return choice;
  });
  return keyAsked;
}

/** Pictures and videos are loaded by the browser itself, which sends no header of ours. */
function setCookie() {
  const [key, secure] = [sessionStorage.getItem(KEY), location.protocol === "https:" ? "; Secure" : ""];
  if (key) document.cookie = `${KEY}=${encodeURIComponent(key)}; SameSite=Strict; path=/${secure}`;
}

function dialog(id) {
  byId(id).returnValue = "";
  byId(id).showModal();
  return new Promise((done) => byId(id).addEventListener("close", () => done(byId(id).returnValue), { once: true }));
}

function call(route, { name, query, json, signal } = {}) {
  return withKey(async (headers) => {
    const options = { method: ROUTES[route].split(" ")[0], headers, signal };
    if (json) Object.assign(options, { body: JSON.stringify(json) }).headers["Content-Type"] = "application/json";
    try {
      return await fetch(address(route, name, query), options);
    } catch (error) {
      throw signal?.aborted ? error : new Error(`The server at ${location.host} cannot be reached.`);
    }
  });
}

/** Sends a file; `fetch` cannot tell how much of it has gone. */
function upload(name, file, onProgress, signal) {
  const send = (headers, done, fail) => {
    const request = new XMLHttpRequest();
    request.open(ROUTES.upload.split(" ")[0], address("upload", name));
    for (const [header, value] of Object.entries(headers)) request.setRequestHeader(header, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onload = () => {
      const later = request.getResponseHeader("Retry-After");
      const options = { status: request.status, headers: later ? { "Retry-After": later } : {} };
      done(new Response(request.responseText || null, options));
    };
    request.onerror = () => fail(new Error("The connection ended before the whole file was sent."));
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  };
  return withKey((headers) => new Promise((done, fail) => send(headers, done, fail)));
}

// The videos

const videos = new Map(); // name -> { status, row }
let chosen = null;
let refreshes = 0;
let timer = 0;

async function refresh() {
  const mine = ++refreshes;
  clearTimeout(timer);
  try {
    const { data } = await (await call("memories")).json();
    if (mine !== refreshes) return; // a later one is under way
    byId("library-error").textContent = "";
    showVideos(data);
  } catch (error) {
    const refused = error.status === 401;
    byId("library-error").textContent = refused ? `${error.message} Reload the page to give a key.` : error.message;
    if (refused) return; // or the dialog would come back every few seconds
  }
  const moving = [...videos.values()].some(({ status }) => isUnfinished(status) || status.state === "following");
  timer = setTimeout(refresh, moving ? 1000 : 5000);
}

const isUnfinished = (status) => status?.state === "waiting" || status?.state === "watching";

function showVideos(statuses) {
  const names = new Set(statuses.map((status) => status.name));
  for (const [name, { row }] of videos) {
    if (names.has(name)) continue;
    row.remove();
    videos.delete(name);
    if (name === chosen) choose(null);
  }
  for (const status of statuses) {
    const before = videos.get(status.name);
    const row = before?.row ?? newRow(status.name);
    videos.set(status.name, { status, row });
    showStatus(row, status);
    if (status.name === chosen && before?.status.state !== status.state && byId("player").hidden) openPlayer();
  }
  byId("no-videos").hidden = videos.size > 0;
  const linked = new URLSearchParams(location.hash.slice(1)).get("video");
  if (chosen === null && names.has(linked)) choose(linked);
  showControls();
}

function newRow(name) {
  const row = copyOf("video-row");
  part(row, "title").textContent = name;
  part(row, "choose").onclick = () => choose(name);
  part(row, "halt").ariaLabel = part(row, "halt").title = `Stop watching ${name}`;
  part(row, "halt").onclick = () => act(row, "halt", name);
  part(row, "remove").ariaLabel = part(row, "remove").title = `Remove ${name}`;
  part(row, "remove").onclick = async () => {
    byId("remove-name").textContent = name;
    if (await dialog("remove-dialog")) act(row, "remove", name);
  };
  byId("videos").append(row);
  return row;
}

async function act(row, route, name) {
  row.refused = "";
  await call(route, { name }).catch((error) => (row.refused = error.message));
  refresh();
}

function showStatus(row, { name, source, state, frames, expected, damage, error }) {
  const length = clock(frames, true);
  const words = {
    waiting: "waits to be watched",
    watching: expected ? `${length} of ${clock(expected, true)}` : `${length} so far`,
    following: `live, ${length}`,
    ready: length,
    stopped: `stopped at ${length}`,
    failed: frames ? `failed at ${length}` : "failed",
  };
  const [choice, progress] = [part(row, "choose"), part(row, "progress")];
  part(row, "state").textContent = words[state] ?? state;
  part(row, "damage").textContent = damage ?? "";
  part(row, "error").textContent = row.refused || (error ?? "");
  choice.title = source ?? "";
  choice.ariaPressed = name === chosen;
  part(row, "halt").hidden = !isUnfinished({ state }) && state !== "following";
  progress.hidden = !isUnfinished({ state });
  progress.ariaLabel = `How much of ${name} has been watched`;
  if (expected) progress.value = frames / expected;
  else progress.removeAttribute("value"); // moves, and tells no share
}

async function addFile(file) {
  const name = file.name.replace(/^\.+/, "").replace(/(.)\.[^.]*$/, "$1") || "video";
  const row = copyOf("video-row");
  const [progress, state, cancel] = [part(row, "progress"), part(row, "state"), part(row, "remove")];
  const control = new AbortController();
  const show = (share) => {
    progress.value = share;
    state.textContent = share < 1 ? `sending, ${Math.floor(100 * share)} %` : "sent, waits for the server";
  };
  part(row, "title").textContent = name;
  part(row, "choose").disabled = part(row, "halt").hidden = true;
  progress.ariaLabel = `How much of ${name} has been sent`;
  cancel.ariaLabel = cancel.title = `Do not send ${name}`;
  cancel.onclick = () => {
    control.abort();
    row.remove();
  };
  show(0);
  byId("uploads").append(row);
  try {
    const response = await upload(name, file, show, control.signal);
    row.remove();
    await showNew(response);
  } catch (error) {
    progress.hidden = true;
    state.textContent = "not sent";
    part(row, "error").textContent = error.message;
  }
}

async function addAddress(event) {
  event.preventDefault();
  const [url, name] = [byId("url").value.trim(), byId("name").value.trim()];
  byId("add-error").textContent = "";
  try {
    const response = await call("add", { json: { url, name: name || undefined, follow: byId("follow").checked } });
    byId("add").reset();
    await showNew(response);
  } catch (error) {
    byId("add-error").textContent = error.message;
  }
}

/** Chooses the video whose status the server has answered with. */
async function showNew(response) {
  const { name } = await response.json();
  await refresh();
  if (videos.has(name)) choose(name);
}

// The chosen video

let withoutVideo = ""; // why only stills are shown

function choose(name) {
  if (name === chosen) return;
  startAnew();
  chosen = name;
  history.replaceState(null, "", name === null ? "#" : `#${new URLSearchParams({ video: name })}`);
  for (const [other, { row }] of videos) part(row, "choose").ariaPressed = other === name;
  byId("chosen").textContent = name ?? "";
  byId("stage").hidden = name === null;
  openPlayer();
  byId("stage").scrollIntoView({ block: "nearest" });
  showControls();
}

function openPlayer() {
  byId("stage-note").textContent = withoutVideo = "";
  byId("player").hidden = false;
  byId("still").hidden = true;
  byId("player").src = chosen === null ? "" : address("video", chosen);
}

async function showStillsInstead() {
  const [name, control] = [chosen, new AbortController()];
  if (name === null || byId("player").hidden) return;
  const second = byId("player").currentTime;
  byId("player").hidden = true;
  byId("still").hidden = false;
  let why = "This browser cannot play the video's file; here are stills.";
  try {
    await call("video", { name, signal: control.signal });
    control.abort(); // the status was all that was wanted
  } catch (error) {
    why = error.message;
  }
  if (name !== chosen) return;
  withoutVideo = why;
  seek(second);
}

function seek(second) {
  showPosition(second);
  if (byId("player").hidden) {
    byId("stage-note").textContent = withoutVideo;
    byId("still").alt = `The video at ${clock(second)}`;
    showPicture(byId("still"), byId("stage-note"), second, 960);
  } else {
    byId("player").currentTime = second;
  }
}

/** Loads a still; where there is none, `errors` says why. */
function showPicture(image, errors, second, width) {
  const [name, query] = [chosen, { second: Math.floor(second), width }];
  image.onload = () => (image.hidden = false);
  image.onerror = () => {
    image.hidden = true;
    call("picture", { name, query }).catch((error) => (errors.textContent = error.message));
  };
  image.src = address("picture", name, query);
}

function showPosition(second) {
  for (const line of document.querySelectorAll(".timeline")) line.show(second);
}

/** Attention over the whole video, to look at and to seek in. */
function newTimeline({ seconds, bins }, moments) {
  const line = copyOf("timeline");
  const [svg, input, here] = [part(line, "curve"), part(line, "second"), part(line, "here")];
  const peak = Math.max(...bins) || 1;
  const draw = (tag, attributes) => {
    const shape = svg.appendChild(document.createElementNS(svg.namespaceURI, tag));
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  };
  svg.setAttribute("viewBox", `0 0 ${seconds} 100`);
  for (const { start, end } of moments) {
    const width = Math.max(end - start, seconds / 150); // or nobody would see it
    draw("rect", { x: (start + end - width) / 2, y: 0, width, height: 100 });
  }
  const heights = bins.map((share, index) => [100 - (95 * share) / peak, ((index + 1) * seconds) / bins.length]);
  draw("path", { d: `M0 100${heights.map(([top, end]) => `V${top}H${end}`).join("")}V100Z` });

  const words = (second) => {
    const share = bins[Math.floor((second / seconds) * bins.length)];
    return `${clock(second)}: ${percent(share)} of attention in a second`;
  };
  const rest = () => (here.textContent = `Attention to each second, at most ${percent(peak)}`);
  line.show = (second) => {
    input.value = second;
    input.ariaValueText = words(Number(input.value));
  };
  input.max = seconds - 1;
  input.oninput = () => {
    here.textContent = words(Number(input.value));
    seek(Number(input.value));
  };
  input.onpointermove = (event) => {
    const share = Math.min(Math.max(event.offsetX / input.clientWidth, 0), 1);
    here.textContent = words(Math.round(share * input.max));
  };
  input.onpointerleave = input.onblur = rest;
  for (const quarter of [0, 1, 2, 3, 4]) {
    const label = part(line, "axis").appendChild(document.createElement("span"));
    label.textContent = clock((quarter / 4) * seconds);
  }
  rest();
  line.show(byId("player").currentTime);
  return line;
}

// The conversation

let model; // its name, once the server has told it
let turns = []; // { question, answer }: those that were answered to the end
let running = null; // the AbortController of the answer that is being written

/** What may be pressed, and what to do first. */
function showControls() {
  const first = videos.size ? "Choose a video to ask about." : "Add a video first, then ask about it.";
  const asked = byId("turns").childElementCount > 0;
  byId("hint").textContent = chosen === null ? first : asked ? "" : EXAMPLES;
  byId("question").disabled = chosen === null;
  byId("send").disabled = chosen === null || running !== null;
  byId("stop").disabled = running === null;
  byId("anew").disabled = !asked;
  byId("along").disabled = turns.length === 0;
  byId("partly").classList.toggle("absent", !isUnfinished(videos.get(chosen)?.status));
}

function startAnew() {
  running?.abort();
  running = null;
  turns = [];
  byId("turns").replaceChildren();
  showControls();
}

function requestFor(question) {
  const said = (byId("along").checked ? turns : []).flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  const messages = [...said, { role: "user", content: question }];
  const video = { type: "video_url", video_url: null, uuid: chosen };
  messages[0].content = [video, { type: "text", text: messages[0].content }];
  const { status } = videos.get(chosen);
  // A stream that is followed has no end to wait for.
  const wait = status.state !== "following" && !(isUnfinished(status) && byId("so-far").checked);
  return { model, messages, stream: true, evidence: true, wait };
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r/);
    rest = lines.pop();
    yield* lines;
  }
}

/** The deltas of a streamed answer; `doing` is what the server says in a comment that it is doing. */
async function* deltasOf(response) {
  for await (const line of linesOf(response)) {
    if (line.startsWith(":")) yield { doing: line.slice(1).trim() };
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const { error, choices } = JSON.parse(data);
    if (error) throw new Error(error.message);
    for (const choice of choices) yield { ...choice.delta, reason: choice.finish_reason };
  }
}

async function ask(event) {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || running || chosen === null) return;
  const [turn, request, begun] = [copyOf("turn"), requestFor(question), performance.now()];
  const control = (running = new AbortController());
  let [doing, answer, reason] = ["waiting", "", null];
  const seconds = () => ((performance.now() - begun) / 1000).toFixed(1);
  const tick = () => (part(turn, "note").textContent = `${doing} · ${seconds()} s`);
  const ticking = setInterval(tick, 100);
  part(turn, "question").textContent = question;
  turn.ariaBusy = "true"; // is read out once it is whole
  byId("turns").append(turn);
  byId("question").value = "";
  showControls();
  turn.scrollIntoView({ block: "nearest" });
  try {
    const response = await call("chat", { json: request, signal: control.signal });
    for await (const delta of deltasOf(response)) {
      if (delta.moments) showEvidence(turn, delta);
      doing = delta.doing ?? (delta.content ? "answering" : doing);
      answer += delta.content ?? "";
      part(turn, "answer").textContent = answer;
      reason = delta.reason ?? reason;
    }
    if (reason === null) throw new Error("The connection ended before the answer did.");
    if (reason === "cancelled") throw new Error("The server ended the answer here.");
    if (running === control) turns.push({ question, answer });
    doing = reason === "length" ? "cut off at its greatest length" : "answered";
  } catch (error) {
    doing = control.signal.aborted ? "stopped" : "failed";
    if (!control.signal.aborted) part(turn, "error").textContent = error.message;
  }
  clearInterval(ticking);
  tick();
  turn.ariaBusy = null;
  if (running === control) running = null;
  showControls();
}

function showEvidence(turn, { moments, curve }) {
  if (curve) part(turn, "evidence").replaceChildren(newTimeline(curve, moments));
  part(turn, "cards").replaceChildren(...moments.map((moment) => newCard(moment, part(turn, "no-picture"))));
  turn.scrollIntoView({ block: "nearest" });
}

function newCard({ start, end, share, label }, errors) {
  const [card, second] = [copyOf("card"), Math.floor((start + end) / 2)]; // at its edges there may be little to see
  part(card, "time").textContent = clock(second);
  part(card, "share").textContent = percent(share);
  part(card, "seek").ariaLabel = `Show ${label}, ${percent(share)} of attention`;
  part(card, "seek").onclick = () => {
    seek(second);
    byId("stage").scrollIntoView({ block: "nearest" });
  };
  showPicture(part(card, "picture"), errors, second, 320);
  return card;
}

// What a person does

byId("file").onchange = (event) => {
  [...event.target.files].forEach(addFile);
  event.target.value = ""; // the same file may be chosen again
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.toggle("dragging", event.dataTransfer.types.includes("Files"));
};
document.ondragleave = (event) => event.relatedTarget ?? document.body.classList.remove("dragging");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  [...event.dataTransfer.files].forEach(addFile);
};
byId("add").onsubmit = addAddress;
byId("ask").onsubmit = ask;
byId("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
  if (event.key === "Escape") running?.abort();
};
byId("stop").onclick = () => running?.abort();
byId("anew").onclick = startAnew;
byId("player").onerror = showStillsInstead;
byId("player").ontimeupdate = byId("player").onseeking = () => showPosition(byId("player").currentTime);

setCookie();
refresh();
call("models")
  .then((response) => response.json())
  .then(({ data }) => (byId("model").textContent = model = data[0].id))
  .catch((error) => (byId("model").textContent = error.message));
