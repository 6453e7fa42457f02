// The page of the console: it shows the pictures that the stream brings, and sends what a button is for.
// Text from the node is only ever put in as text, never as markup.

const API = "/api/v1";
const byId = (id) => document.getElementById(id);
let session = null; // {user, role, csrf}
let stream = null;
let latest = null;
let busy = false;
let lastPicture = 0;
const rates = [];
const RATES = 120;
const STALE_MS = 6000;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(method, path, body) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (session) headers["X-CSRF-Token"] = session.csrf;
  let answer;
  try {
    answer = await fetch(API + path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refused(0, "the console does not answer: is the controller of this node running?");
  }
  if (answer.status === 204) return {};
  const content = await answer.json().catch(() => ({ error: `the answer is none (${answer.status})` }));
  if (!answer.ok) throw new Refused(answer.status, content.error);
  return content;
}

// ---- logging in and out

async function begin() {
  try {
    session = await call("GET", "/session");
  } catch (error) {
    return showLogin(error.status === 401 ? "" : error.message);
  }
  byId("login").hidden = true;
  byId("main").hidden = byId("who").hidden = false;
  byId("user").textContent = `${session.user} (${session.role})`;
  byId("actions").hidden = session.role !== "operate";
  watch();
}

function showLogin(error) {
  session = null;
  if (stream) stream.close();
  stream = null;
  byId("main").hidden = byId("who").hidden = true;
  byId("login").hidden = false;
  byId("login-error").textContent = error;
  byId("name").focus();
}

byId("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const password = byId("password");
  try {
    session = await call("POST", "/session", { user: byId("name").value, password: password.value });
    password.value = "";
    await begin();
  } catch (error) {
    byId("login-error").textContent = error.message;
  }
});

byId("log-out").addEventListener("click", async () => {
  await call("DELETE", "/session").catch(() => {});
  showLogin("");
});

// ---- the stream

function watch() {
  if (stream) stream.close();
  stream = new EventSource(`${API}/stream`);
  stream.addEventListener("picture", (event) => {
    lastPicture = Date.now();
    show(JSON.parse(event.data));
  });
  stream.addEventListener("over", () => showLogin("Logged out."));
  stream.addEventListener("error", async () => {
    if (stream && stream.readyState === EventSource.CLOSED) {
      try {
        await call("GET", "/session");
        setTimeout(watch, 2000);
      } catch (error) {
        if (error.status === 401) showLogin("Logged out.");
        else setTimeout(watch, 2000);
      }
    }
  });
}

setInterval(() => {
  const stale = byId("stale");
  stale.hidden = !latest || Date.now() - lastPicture < STALE_MS;
  if (!stale.hidden) {
    const ago = Math.round((Date.now() - lastPicture) / 1000);
    stale.textContent = `Nothing was heard of this node for ${ago} s: what stands here is old. Look at the other node's console.`;
  }
}, 1000);

// ---- showing

function element(tag, text, ...classes) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  made.classList.add(...classes.filter(Boolean));
  return made;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? count.toFixed(0) : count.toFixed(1)} ${units[unit]}`;
}

function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  return `${seconds.toFixed(1)} s`;
}

function show(picture) {
  latest = picture;
  document.title = `${picture.protection.level === "good" ? "" : "⚠ "}mirrorfs ${picture.volume}`;
  byId("volume").textContent = picture.volume;
  byId("version").textContent = picture.version;
  const protection = byId("protection");
  if (protection.textContent !== picture.protection.sentence) protection.textContent = picture.protection.sentence;
  protection.className = picture.protection.level;
  picture.nodes.forEach((node, place) => showNode(document.querySelector(`[data-node="${place}"]`), node, picture));
  showLink(picture);
  showButtons(picture);
  showSplit(picture);
  showProgress(picture);
  showSpeed(picture);
  showDetails(picture);
  showEvents(picture.events);
}

function showNode(card, node, picture) {
  const serves = picture.serves === node.name;
  card.classList.toggle("serving", serves);
  card.dataset.name = node.name;
  card.dataset.state = node.state;
  const title = element("h2", node.name);
  if (serves) title.append(element("span", "serves", "badge", "serves"));
  if (node.is_this) title.append(element("span", "this node", "badge"));
  const lines = [
    element("p", node.state, "state"),
    element("p", `services ${node.services}, addresses ${node.addresses}`),
    element("p", node.because ? `${node.posture}: ${node.because}` : node.posture),
  ];
  if (!node.heard) lines.push(element("p", "its controller is not heard", "error"));
  card.replaceChildren(title, ...lines);
}

function showLink(picture) {
  const link = byId("link");
  link.className = picture.protection.level;
  byId("link-word").textContent =
    picture.protection.level === "good" ? "⇄ mirrored" : picture.resync ? "→ catching up" : "✕ not mirrored";
}

function showButtons(picture) {
  const states = picture.nodes.map((node) => node.state);
  byId("switch-over").disabled = busy || !picture.can_switch_over;
  const waits = states[0] === "waiting" && picture.serves === null && !picture.split_brain;
  byId("take-over").hidden = !waits;
  byId("take-over").disabled = busy;
  byId("maintenance").textContent = picture.maintenance ? "End maintenance" : "Maintenance";
  byId("maintenance").disabled = busy;
  byId("pause").textContent = picture.paused ? "Resume replication" : "Pause replication";
  byId("pause").disabled = busy || !(picture.paused || picture.protection.level === "good");
  const running = picture.verify && picture.verify.running;
  byId("verify").textContent = running ? "Stop verify" : "Verify";
  byId("verify").disabled = busy || !(running || states[0] === "primary");
}

function showSplit(picture) {
  byId("split").hidden = !picture.split_brain;
  byId("split-text").textContent = picture.split_brain;
  const row = byId("split-buttons");
  row.hidden = !session || session.role !== "operate";
  const names = picture.nodes.map((node) => node.name);
  if (row.dataset.names === names.join()) return;
  row.dataset.names = names.join();
  row.replaceChildren(
    ...names.map((name, place) => {
      const button = element("button", `Keep the history of ${name}`, "danger");
      button.addEventListener("click", () =>
        act("/split-brain/resolve", { keep: name }, `Keep the history of ${name}?`, `Keep ${name}`,
          `What ${names[1 - place]} changed on its own is set aside there and can be exported. ${names[1 - place]} becomes a copy of ${name}.`));
      return button;
    }),
  );
}

function showProgress(picture) {
  const verify = picture.verify && picture.verify.running ? picture.verify : null;
  byId("progress").hidden = !picture.resync && !verify;
  const bar = byId("progress-bar");
  if (picture.resync) {
    byId("progress-title").textContent = `Resync (${picture.resync.kind})`;
    byId("progress-text").textContent = picture.resync.sentence;
    if (picture.resync.share === null) bar.removeAttribute("value");
    else bar.value = picture.resync.share;
  } else if (verify) {
    byId("progress-title").textContent = "Verify: both trees are being compared";
    byId("progress-text").textContent = `${bytes(verify.bytes)}, ${verify.files} files, differences: ${verify.found}`;
    bar.removeAttribute("value");
  }
}

function showSpeed(picture) {
  const rate = picture.write_bytes_per_s;
  byId("rate").textContent = rate === null ? "–" : `${bytes(rate)}/s`;
  byId("changes").textContent =
    picture.changes_per_s === null ? "" : `${picture.changes_per_s.toFixed(0)} changes/s, ${picture.syncs_per_s.toFixed(0)} syncs/s`;
  rates.push(rate || 0);
  if (rates.length > RATES) rates.shift();
  const most = Math.max(...rates, 1);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const points = rates.map((each, place) => `${(120 - rates.length + place + 1).toFixed(1)},${(29 - (27 * each) / most).toFixed(1)}`);
  path.setAttribute("d", `M${points.join("L")}`);
  byId("spark").replaceChildren(path);
  const rows = [];
  for (const [kind, name] of [["change", "a change"], ["sync", "a sync"]]) {
    const found = picture.latency[kind];
    for (const [part, word] of [["total", name], ["local", "here"], ["wire", "way"], ["peer", "there"]]) {
      const row = element("tr", undefined, part === "total" ? "" : "part");
      row.append(element("td", word), element("td", time(found[part].p50_s)), element("td", time(found[part].p99_s)));
      rows.push(row);
    }
  }
  byId("latency").replaceChildren(...rows);
}

function showDetails(picture) {
  const arbiter = picture.arbiter;
  const facts = [
    ["Epoch", picture.epoch],
    ["Reason", picture.reason],
    ["Not yet on both disks", picture.dirty_bytes === null ? "" : bytes(picture.dirty_bytes)],
    ["Open files", picture.open_files],
    ["Heartbeats", Object.entries(picture.networks).map(([name, up]) => `${name}: ${up ? "heard" : "SILENT"}`).join(", ")],
    ["Arbiter", !arbiter || arbiter.kind === "none" ? "none" : `${arbiter.name}: ${arbiter.answers ? "answers" : `DOES NOT ANSWER: ${arbiter.why}`}`],
    ["Last verify", picture.verify && picture.verify.last ? `${picture.verify.last.ended}, differences: ${picture.verify.last.found}` : "never"],
    ["Maintenance", picture.maintenance ? "on: nothing is done automatically" : "off"],
    ["Trouble", picture.trouble],
    ["Warning", picture.warning],
    ["Configuration differs", picture.differences.join("; ")],
  ];
  byId("details").replaceChildren(
    ...facts.filter(([, value]) => value !== "" && value !== undefined).flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]),
  );
}

function showEvents(events) {
  const newest = events.length ? events[0].at + events[0].text : "";
  const list = byId("events");
  if (list.dataset.newest === newest) return;
  list.dataset.newest = newest;
  list.replaceChildren(
    ...events.map((event) => {
      const line = element("li", undefined, event.level);
      const when = element("time", new Date(event.at * 1000).toLocaleString());
      when.dateTime = new Date(event.at * 1000).toISOString();
      line.append(when, element("span", event.text));
      return line;
    }),
  );
}

// ---- acting

function ask(title, text, yes) {
  const dialog = byId("dialog");
  byId("dialog-title").textContent = title;
  byId("dialog-text").textContent = text;
  byId("dialog-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

function say(text, bad) {
  const message = byId("message");
  message.hidden = false;
  message.textContent = text;
  message.classList.toggle("bad", bad);
}

async function act(path, body, title, yes, text) {
  if (title && !(await ask(title, text, yes))) return;
  busy = true;
  say("working …", false);
  if (latest) showButtons(latest);
  try {
    say((await call("POST", path, body)).message, false);
  } catch (error) {
    if (error.status === 401) return showLogin("Logged out.");
    if (error.status === 428 && (await ask("Are you sure?", error.message, "Yes"))) {
      busy = false;
      return await act(path, { ...body, yes: true });
    }
    say(error.message, true);
  } finally {
    busy = false;
    if (latest) showButtons(latest);
  }
}

byId("switch-over").addEventListener("click", () => {
  const from = latest.serves;
  const to = latest.nodes.map((node) => node.name).find((name) => name !== from);
  act("/switchover", {}, `Switch over to ${to}?`, `Switch over to ${to}`,
    `Addresses, services and the primary's role move from ${from} to ${to}. Both have everything; nothing is lost.\n`
    + `The application is stopped on ${from} and started on ${to}.`);
});
byId("take-over").addEventListener("click", () =>
  act("/promote", {}, "Serve here?", "Serve here", "This node asks for the primary's role without the other one."));
byId("maintenance").addEventListener("click", () =>
  latest.maintenance
    ? act("/maintenance", { on: false })
    : act("/maintenance", { on: true }, "Begin maintenance?", "Begin maintenance",
      "Until it is ended, nothing is done automatically on both nodes: no failover, no restarts."));
byId("pause").addEventListener("click", () =>
  latest.paused ? act("/resume", {}) : act("/pause", {}));
byId("verify").addEventListener("click", () =>
  act(latest.verify && latest.verify.running ? "/verify/stop" : "/verify", {}));

begin();
