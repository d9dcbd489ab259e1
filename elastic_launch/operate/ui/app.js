// The page of "elastic-job ui". Whatever comes from a job becomes text (textContent), never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const PAGE_OF_NODES = 50; // Nodes that are shown at first, and added by a click.
const MAX_TILES = 128; // Ranks of a node that have a tile each.
const SHOWN_ROUNDS = 10;
const MAX_LOG = 400_000; // Characters of a log that the page keeps.
const RETRY = [1, 2, 5, 10]; // Seconds until the server is tried again.

// State of a job, node or worker: tone, sign.
const STATES = {
  running: ["go", "running"], succeeded: ["go", "done"], done: ["off", "stopped"], failed: ["bad", "failed"],
  stopped: ["off", "stopped"], stopping: ["warn", "stopping"], starting: ["info", "waiting"],
  joining: ["info", "waiting"], joined: ["info", "waiting"], waiting: ["info", "waiting"],
  holding: ["warn", "paused"], draining: ["warn", "paused"], pausing: ["warn", "paused"],
  agreeing: ["warn", "again"], restarting: ["warn", "again"], left: ["off", "stopped"],
  unresponsive: ["bad", "unknown"], stalled: ["bad", "paused"], gone: ["bad", "unknown"],
};
// How a round ended: tone, sign, words if no reason is known.
const ENDS = {
  failed: ["bad", "failed", "a failure"], membership_changed: ["warn", "change", "other nodes"],
  stop: ["off", "stopped", "stopped"], done: ["go", "done", "all workers succeeded"], error: ["bad", "failed", "an error"],
};
// Parts of a job's time: name, class, and where it is in the job's progress.
const PARTS = [
  ["in steps", "steps", (p) => p.in_steps], ["first start", "startup", (p) => p.startup],
  ["stalled", "stalled", (p) => p.stalled_seconds + (p.stalled ? p.seconds_since_step ?? 0 : 0)], ["noticing failures", "detection", (p) => p.lost_seconds?.detection],
  ["stopping", "stopping", (p) => p.lost_seconds?.stopping], ["rendezvous", "rendezvous", (p) => p.lost_seconds?.rendezvous],
  ["starting again", "start", (p) => p.lost_seconds?.start],
];

// ---- Small things

/** Make an element. Attributes that are null or false are left out; children are elements or text. */
function make(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function sign(name) {
  return make("svg:svg", { class: "sign", "aria-hidden": "true" }, make("svg:use", { href: `#sign-${name}` }));
}

/** Change text only if it differs, so that a selection in it survives. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Fill an element anew, but only if what it shows has changed. */
function fill(element, key, children) {
  const text = JSON.stringify(key);
  if (element.dataset.key === text) return;
  element.dataset.key = text;
  element.replaceChildren(...children());
}

function duration(seconds) {
  for (const [size, unit, part, partUnit] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (Math.round(seconds) >= size) {
      const parts = Math.round(seconds / part);
      const rest = parts % (size / part);
      return `${Math.floor(parts / (size / part)).toLocaleString("en")} ${unit}` + (rest ? ` ${rest} ${partUnit}` : "");
    }
  }
  return seconds < 9.95 ? `${Math.max(0, seconds).toFixed(1)} s` : `${Math.round(seconds)} s`;
}

function whole(seconds) {
  return seconds < 60 ? `${Math.max(0, Math.floor(seconds))} s` : duration(seconds);
}

function clock(seconds) {
  const then = new Date(seconds * 1000);
  const isToday = then.toDateString() === new Date().toDateString();
  const options = isToday ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(undefined, options).format(then);
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const brief = (number) => (number >= 100 ? Math.round(number).toLocaleString("en") : number.toPrecision(3));
const span = (ranks) => (ranks[0] === ranks[1] ? `${ranks[0]}` : `${ranks[0]}–${ranks[1]}`);
const look = (state) => STATES[state] ?? ["off", "unknown"];

function badge(state, text = state) {
  const [tone, itsSign] = look(state);
  return make("span", { class: `badge ${tone}` }, sign(itsSign), text);
}

// ---- The server

const session = (() => {
  try { return window.sessionStorage; } catch { return null; } // forbidden by the browser's settings
})();
let token = session?.getItem("token") ?? "";
let offset = 0; // Seconds that the server's clock is ahead.
const now = () => Date.now() / 1000 + offset;

async function ask(path, query, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const reply = await fetch(`${path}?${new URLSearchParams(query)}`, { ...options, headers, cache: "no-store" });
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  throw Object.assign(new Error(body.error ?? `the server says ${reply.status}`), { status: reply.status });
}

let stream = null; // The AbortController of the stream that is open.

/** Follow the events of what the page shows, until it shows something else. */
async function follow() {
  stream?.abort();
  const mine = (stream = new AbortController());
  const query = { ...(shown.job === null ? {} : { job: shown.job }), ...(shown.log ?? {}) };
  for (let failures = 0; stream === mine; ) {
    let again = true;
    try {
      const reply = await ask("api/events", query, { signal: mine.signal });
      shown.nodes = [];
      for await (const [kind, data] of events(reply.body)) {
        if (stream !== mine) return;
        failures = 0;
        setLive("live");
        offset = data.now === undefined ? offset : data.now - Date.now() / 1000;
        RECEIVE[kind]?.(data);
        if (kind === "error" || (kind === "job" && data.is_over)) again = false;
      }
      if (stream === mine && !again) setLive(shown.view?.is_over ? "ended" : "");
    } catch (error) {
      if (stream !== mine) return;
      if (error.status === 401) { askForToken(); return; }
      if (error.status) showProblem(error.message);
      setLive("lost");
    }
    if (!again) {
      if (shown.view?.is_over) return;
      failures = Math.max(failures, 1); // no such job: it may be started
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * RETRY[Math.min(failures, RETRY.length - 1)]));
    failures += 1;
  }
}

/** Yield the events of a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = new Map(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]));
      if (fields.has("data")) yield [fields.get("event"), JSON.parse(fields.get("data"))];
    }
  }
}

const RECEIVE = { jobs: receiveJobs, job: receiveJob, log: receiveLog, error: (data) => showProblem(data.error) };

function setLive(state) {
  const words = { live: "live", ended: "ended", lost: "no connection; trying again", "": "" };
  const tones = { live: "go", ended: "off", lost: "bad", "": "off" };
  const signs = { live: "running", ended: "stopped", lost: "unknown" };
  $("live").className = `state ${tones[state]}`;
  fill($("live"), state, () => (state ? [sign(signs[state]), words[state]] : []));
}

/** Tell people who use a screen reader. */
function say(text) {
  setText($("said"), text);
}

function showProblem(text) {
  $("problem").hidden = !text;
  setText($("problem"), text);
}

function askForToken() {
  setLive("");
  for (const id of ["list", "job"]) $(id).hidden = true;
  if (token) showProblem("That token is wrong.");
  $("ask").hidden = false;
  $("token").focus();
}

// ---- What is shown

const shown = { job: null, view: null, nodes: [], limit: PAGE_OF_NODES, rank: null, log: null, suspects: new Set(), allRounds: false };

/** Show what the address says: #/ the list, #/job/NAME a job; #token=T brings the token. */
function route() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given !== null) {
    token = given;
    session?.setItem("token", token);
    history.replaceState(null, "", "#/");
  }
  const found = /^#\/job\/(.+)$/.exec(location.hash);
  let job = null;
  try { job = found && decodeURIComponent(found[1]); } catch { /* not an address of ours */ }
  Object.assign(shown, { job, view: null, nodes: [], limit: PAGE_OF_NODES, rank: null, log: null, suspects: new Set(), allRounds: false });
  for (const id of ["ask", "list", "job", "problem", "stacks", "log", "rank"]) $(id).hidden = true;
  $("find").value = "";
  setText($("log-note"), "");
  setText($("stacks-note"), "Where each rank stands in its code, merged. The ranks go on working.");
  $("nodes").replaceChildren();
  rows.clear();
  setText($("crumb"), job === null ? "" : `› ${job}`);
  $("home").toggleAttribute("aria-current", job === null);
  document.title = job ?? "Jobs on this host";
  follow();
}

// ---- The list

function receiveJobs(data) {
  showProblem("");
  $("list").hidden = false;
  $("no-jobs").hidden = data.jobs.length > 0;
  $("ended-title").hidden = data.ended.length === 0;
  for (const [id, jobs] of [["jobs", data.jobs], ["ended", data.ended]]) {
    fill($(id), jobs.map(({ progress, ...rest }) => [rest, progress?.steps, progress?.stalled]), () => jobs.map(card));
  }
  tick();
}

function card(job) {
  const progress = job.progress ?? {};
  const state = job.is_lost ? "gone" : progress.stalled && job.state === "running" ? "stalled" : job.state;
  const facts = [
    job.round === null || job.round === undefined ? null : `round ${job.round}`,
    job.node_count ? count(job.node_count, "node") : null,
    job.world_size ? count(job.world_size, "worker") : null,
    job.max_restarts ? `${job.restarts} of ${count(job.max_restarts, "restart")} used` : null,
    progress.steps ? count(progress.steps, "step") : null,
    progress.steps_per_second ? `${brief(progress.steps_per_second)} steps/s` : null,
  ];
  const since = job.started_at && !job.is_over ? make("p", { class: "quiet", "data-since": job.started_at }) : null;
  return make("li", {},
    make("h2", {}, make("a", { href: `#/job/${encodeURIComponent(job.key)}` }, job.job), badge(state)),
    job.program ? make("p", { class: "quiet" }, job.program) : null,
    make("p", {}, facts.filter((fact) => fact).join(" · ")),
    job.waits_for ? make("p", {}, `waits for ${job.waits_for}`) : null,
    job.last_trouble ? make("p", { class: "trouble" }, `last: ${job.last_trouble}`) : null,
    since);
}

// ---- A job

function receiveJob(view) {
  const before = shown.view;
  shown.view = view;
  for (const [place, node] of Object.entries(view.nodes)) shown.nodes[place] = node;
  shown.nodes.length = view.node_total;
  showProblem("");
  const isFirst = $("job").hidden;
  $("job").hidden = false;
  announce(before, view);
  showHead(view);
  showNotices(view);
  showFacts(view);
  showNodes();
  showRank();
  showRounds(view);
  showTime(view.progress);
  $("stacks-take").disabled = view.is_over || $("stacks").getAttribute("aria-busy") === "true";
  if (isFirst || before?.round !== view.round) refreshFiles();
  tick();
}

function stateOf(view) {
  if (view.is_lost) return "gone";
  return view.progress?.stalled && view.state === "running" ? "stalled" : view.state;
}

function announce(before, view) {
  if (!before) return;
  const state = stateOf(view);
  if (state === "stalled" && stateOf(before) !== "stalled") say("The job makes no progress.");
  else if (view.round !== before.round && view.last_trouble) say(`Round ${view.round}, because ${view.last_trouble}`);
  else if (state !== stateOf(before)) say(`The job is ${state}.`);
}

function showHead(view) {
  const state = stateOf(view);
  setText($("job-title"), view.job);
  fill($("state"), state, () => [badge(state)]);
  const round = view.round === null ? [] : [`round ${view.round}`];
  setText($("subtitle"), [view.program, ...round].filter(Boolean).join(" · "));
  document.title = `${state}: ${view.job}`;
}

function showNotices(view) {
  const found = [];
  const progress = view.progress ?? {};
  if (view.is_lost) {
    found.push(["bad", "unknown", `Its agents on this host are gone and have not said how the job ended; they may have been killed. It was ${view.state}.`]);
  } else if (view.is_over) {
    const [tone, itsSign] = look(view.state);
    found.push([tone, itsSign, `The job has ended: ${view.state}. This is how it was at last.`]);
  } else if (progress.stalled && progress.seconds_since_step !== null) {
    found.push(["bad", "paused", `No rank has made a step for ${whole(progress.seconds_since_step)}. The stacks tell where they stand.`]);
  } else if (progress.stalled) {
    found.push(["bad", "paused", "No rank makes progress. The stacks tell where they stand."]);
  }
  if (view.waits_for && !view.is_over) found.push(["info", "waiting", `Waits for ${view.waits_for}`]);
  if (view.remark && !view.is_over) found.push(["warn", "unknown", view.remark]);
  if (view.last_trouble) found.push([view.state === "failed" ? "bad" : "warn", "again", `Last trouble: ${view.last_trouble}`]);
  fill($("notices"), found, () => found.map(([tone, itsSign, text]) => make("li", { class: tone }, sign(itsSign), make("span", {}, text))));
}

function showFacts(view) {
  const progress = view.progress ?? {};
  const nodes = view.node_count ?? view.node_total;
  const limits = view.max_nodes && view.min_nodes !== view.max_nodes ? `of ${view.min_nodes} to ${view.max_nodes}` : null;
  const spares = shown.nodes.filter((node) => node?.role === "spare").length;
  const uncharged = view.uncharged_restarts ? `${view.uncharged_restarts} more, uncharged` : null;
  const lost = Object.values(progress.lost_seconds ?? {}).reduce((sum, part) => sum + (part ?? 0), 0);
  const inRound = view.round_started_at && view.round ? `round ${view.round} for ${whole(now() - view.round_started_at)}` : null;
  const facts = [
    ["Nodes", nodes?.toLocaleString("en"), [limits, spares ? count(spares, "spare") : null].filter(Boolean).join(", ")],
    ["Workers", view.world_size?.toLocaleString("en")],
    ["Steps", progress.steps?.toLocaleString("en"), progress.stalled ? "none now" : progress.steps_per_second ? `${brief(progress.steps_per_second)} per second` : progress.repeated ? `${progress.repeated} repeated` : null],
    ["Goodput", progress.goodput === null || progress.goodput === undefined ? null : percent(progress.goodput), lost ? `${duration(lost)} lost to restarts` : "of the time in steps"],
    ["Restarts used", view.max_restarts === null ? view.restarts?.toString() : `${view.restarts} of ${view.max_restarts}`, uncharged],
    ["Running for", view.started_at && !view.is_over ? { since: view.started_at } : null, inRound ?? (view.started_at ? `since ${clock(view.started_at)}` : null)],
  ].filter(([, value]) => value !== null && value !== undefined);
  fillFacts($("facts"), facts);
}

/** Show facts; those whose names stay the same keep their elements. A value with "since" counts up by itself. */
function fillFacts(list, facts) {
  fill(list, facts.map(([name, value]) => [name, value?.since]), () =>
    facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {},
      make("span", { "data-since": value.since ?? null }), make("small")))));
  facts.forEach(([, value, note], place) => {
    const [text, small] = list.children[place].lastChild.children;
    if (value.since === undefined) setText(text, value);
    setText(small, note ?? "");
  });
}

/** Let the durations grow. */
function tick() {
  for (const element of document.querySelectorAll("[data-since]")) {
    const text = whole(Math.max(0, now() - Number(element.dataset.since)));
    setText(element, element.tagName === "P" ? `for ${text}` : text);
  }
}

// ---- Nodes and ranks

const rows = new Map(); // The rows of the grid, by place of the node.

function showNodes() {
  const nodes = shown.nodes.map((node, place) => ({ node, place })).filter(({ node }) => node);
  const tally = new Map();
  for (const { node } of nodes) tally.set(node.state, (tally.get(node.state) ?? 0) + 1);
  const workers = new Map();
  for (const { node } of nodes) {
    for (const it of node.workers ?? []) workers.set(stateOfWorker(it), (workers.get(stateOfWorker(it)) ?? 0) + 1);
  }
  const counts = [...[...tally].map(([state, number]) => [state, count(number, "node")]), ...[...workers].map(([state, number]) => [state, count(number, "rank")])];
  fill($("counts"), counts, () => counts.map(([state, text]) => {
    const [tone, itsSign] = look(state);
    return make("li", {}, make("span", { class: `state ${tone}` }, sign(itsSign), `${text} ${state}`));
  }));

  $("find-box").hidden = nodes.length <= 8;
  const wanted = $("find-box").hidden ? "" : $("find").value.trim().toLowerCase();
  const found = nodes.filter(({ node }) => matches(node, wanted));
  const isUsual = ({ node }) => (["running", "joined"].includes(node.state) && !node.role && !((node.heartbeat ?? 0) >= 10) ? 1 : 0);
  if (found.length > shown.limit) found.sort((one, other) => isUsual(one) - isUsual(other) || one.place - other.place);
  const visible = found.slice(0, shown.limit).sort((one, other) => one.place - other.place);
  const more = found.length - visible.length;
  $("more").hidden = more <= 0;
  setText($("more"), `Show ${Math.min(more, PAGE_OF_NODES)} more`);
  $("hint").hidden = more <= 0 && !(wanted && !found.length);
  setText($("hint"), wanted && !found.length ? "No node like that." : `${visible.length} of ${found.length.toLocaleString("en")}; those that stand out come first.`);

  const places = new Set(visible.map(({ place }) => place));
  for (const [place, row] of rows) if (!places.has(place)) { row.element.remove(); rows.delete(place); }
  let after = null;
  for (const { node, place } of visible) {
    const row = rows.get(place) ?? newRow();
    rows.set(place, row);
    updateRow(row, node);
    const next = after ? after.nextSibling : $("nodes").firstChild;
    if (next !== row.element) $("nodes").insertBefore(row.element, next);
    after = row.element;
  }
  const tiles = [...$("nodes").querySelectorAll("button")];
  if (tiles.length && !tiles.some((tile) => tile.tabIndex === 0)) tiles[0].tabIndex = 0;
}

function matches(node, wanted) {
  if (!wanted) return true;
  if (/^\d+$/.test(wanted) && node.ranks && Number(wanted) >= node.ranks[0] && Number(wanted) <= node.ranks[1]) return true;
  return `${node.host} ${node.state} ${node.role ?? ""}`.toLowerCase().includes(wanted);
}

function newRow() {
  const head = make("th", { scope: "row", role: "rowheader" });
  const state = make("td", { role: "cell" });
  const ranks = make("td", { role: "cell" });
  return { element: make("tr", { role: "row" }, head, state, ranks), head, state, ranks, tiles: new Map() };
}

function updateRow(row, node) {
  fill(row.head, [node.host, node.group_rank, node.pid], () => [
    node.host,
    make("small", {}, `${node.group_rank === null ? "" : `node ${node.group_rank}, `}pid ${node.pid}`)]);
  const late = node.heartbeat >= 10 ? `no heartbeat for ${node.heartbeat} s` : null;
  const [tone, itsSign] = look(node.state);
  fill(row.state, [node.state, node.role, late], () => [
    make("span", { class: `state ${tone}` }, sign(itsSign), node.state),
    node.role ? make("small", {}, node.role) : null,
    late ? make("small", { class: "bad" }, late) : null,
  ].filter(Boolean));
  if (!node.workers?.length || node.workers.length > MAX_TILES) {
    row.tiles.clear();
    fill(row.ranks, ["span", node.ranks], () => [node.ranks ? make("span", { class: "quiet" }, `ranks ${span(node.ranks)}`) : make("span", { class: "quiet" }, "none")]);
    return;
  }
  fill(row.ranks, ["tiles", node.workers.map((worker) => worker.rank)], () => {
    row.tiles.clear();
    return [make("ul", { class: "tiles" }, ...node.workers.map((worker) => {
      const name = make("b");
      const detail = make("small");
      const button = make("button", { class: "tile", type: "button", tabindex: "-1", "data-rank": worker.rank }, name, detail);
      row.tiles.set(worker.rank, { button, name, detail });
      return make("li", {}, button);
    }))];
  });
  for (const worker of node.workers) updateTile(row.tiles.get(worker.rank), worker);
}

function stateOfWorker(worker) {
  return worker.state === "running" && shown.view.progress?.stalled ? "stalled" : worker.state;
}

/** What a rank gets done, in a few words: for its tile, and in full. */
function doing(worker) {
  const progress = worker.progress;
  if (worker.state !== "running" || !progress) {
    const code = worker.exit_code;
    return code ? [code < 0 ? `signal ${-code}` : `exit code ${code}`, ""] : [worker.state, ""];
  }
  if (progress.phase) return [progress.phase, `in phase ${progress.phase}`];
  const steps = progress.step ?? progress.steps;
  return [`step ${steps.toLocaleString("en")}`, ""];
}

function updateTile(tile, worker) {
  const itsState = stateOfWorker(worker);
  const isSuspect = shown.suspects.has(worker.rank);
  const [tone, itsSign] = look(itsState);
  const [text, full] = doing(worker);
  const kind = `tile ${tone}${isSuspect ? " suspect" : ""}`;
  if (tile.button.getAttribute("class") !== kind) tile.button.setAttribute("class", kind);
  tile.button.setAttribute("aria-pressed", String(shown.rank === worker.rank));
  const state = `${itsState}${isSuspect ? ", suspect" : ""}`;
  const label = `rank ${worker.rank}, ${state}${text === worker.state ? "" : `, ${full || text}`}`;
  if (tile.button.getAttribute("aria-label") !== label) tile.button.setAttribute("aria-label", label);
  fill(tile.name, [itsSign, worker.rank], () => [sign(itsSign), String(worker.rank)]);
  setText(tile.detail, isSuspect ? "suspect" : text);
}

function workerOf(rank) {
  for (const node of shown.nodes) for (const worker of node?.workers ?? []) if (worker.rank === rank) return [node, worker];
  return [null, null];
}

function showRank() {
  const [node, worker] = shown.rank === null ? [null, null] : workerOf(shown.rank);
  $("rank").hidden = !worker;
  if (!worker) return;
  const progress = worker.progress ?? {};
  setText($("rank-title"), `Rank ${worker.rank} on ${node.host}`);
  fillFacts($("rank-facts"), [
    ["State", worker.state, worker.exit_code === null ? null : doing(worker)[0]],
    ["Pid", worker.pid?.toString() ?? "–", `local rank ${worker.local_rank}`],
    ["Steps in this round", progress.steps?.toLocaleString("en") ?? "–", progress.step === null || progress.step === undefined ? null : `step ${progress.step.toLocaleString("en")} of the script`],
    ["Steps per second", progress.steps_per_second ? brief(progress.steps_per_second) : "–"],
    ["Last step", progress.seconds_since_step === null || progress.seconds_since_step === undefined ? "–" : `${whole(progress.seconds_since_step)} ago`],
    ["Phase", progress.phase || "–"],
  ]);
  $("rank-log").hidden = !files.some(([, rank]) => rank === worker.rank);
}

function chooseRank(rank) {
  shown.rank = shown.rank === rank ? null : rank;
  showNodes();
  showRank();
}

/** The grid has one tab stop; arrow keys go from rank to rank. */
function moveInGrid(event) {
  const tiles = [...$("nodes").querySelectorAll("button")];
  const at = tiles.indexOf(event.target);
  if (at < 0) return;
  const box = event.target.getBoundingClientRect();
  const nearest = (isBeyond) => {
    const places = tiles.map((tile) => tile.getBoundingClientRect());
    const distance = (place) => Math.abs(place.top - box.top) * 1000 + Math.abs(place.left - box.left);
    const beyond = tiles.filter((tile, place) => isBeyond(places[place]));
    return beyond.sort((one, other) => distance(one.getBoundingClientRect()) - distance(other.getBoundingClientRect()))[0];
  };
  const moves = {
    ArrowRight: () => tiles[at + 1], ArrowLeft: () => tiles[at - 1], Home: () => tiles[0], End: () => tiles.at(-1),
    ArrowDown: () => nearest((place) => place.top > box.top + 2), ArrowUp: () => nearest((place) => place.top < box.top - 2),
  };
  const next = moves[event.key]?.();
  if (!(event.key in moves)) return;
  event.preventDefault();
  if (next) next.focus();
}

// ---- Rounds

function showRounds(view) {
  const rounds = [...view.rounds].reverse();
  const visible = shown.allRounds ? rounds : rounds.slice(0, SHOWN_ROUNDS);
  fill($("rounds").tBodies[0], visible, () => visible.map((round) => {
    const [tone, itsSign, words] = ENDS[round.end] ?? [];
    const lasted = round.started_at && round.ended_at ? duration(Math.max(0, round.ended_at - round.started_at)) : "–";
    const size = [round.nodes && count(round.nodes, "node"), round.world_size && count(round.world_size, "worker")].filter(Boolean).join(", ");
    const cell = (...children) => make("td", { role: "cell", class: "number" }, ...children);
    return make("tr", { role: "row" },
      cell(String(round.round)),
      cell(round.started_at ? clock(round.started_at) : "–"),
      cell(round.end || !round.started_at || view.is_over ? lasted : make("span", { "data-since": round.started_at })),
      cell(size || "–"),
      make("td", { role: "cell" }, round.end ? make("span", { class: `state ${tone}` }, sign(itsSign)) : "", round.end ? ` ${round.reason || words}` : "–"));
  }));
  $("all-rounds").hidden = visible.length === rounds.length;
  setText($("all-rounds"), `Show ${rounds.length - visible.length} earlier rounds`);
  showLine(view);
}

/** Draw the rounds as bars along the time. */
function showLine(view) {
  const rounds = view.rounds.filter((round) => round.started_at);
  const width = Math.max(280, Math.floor($("line").clientWidth));
  const begin = Math.min(...rounds.map((round) => round.started_at), view.started_at ?? Infinity);
  const end = view.is_over ? Math.max(...rounds.map((round) => round.ended_at ?? round.started_at)) : now();
  if (!rounds.length || !(end > begin)) { fill($("line"), null, () => []); return; }
  const step = tickStep((end - begin) / (width / 90));
  // Redrawn when a round is new or has ended, and when the picture would move by a pixel.
  const moved = Math.round((end - begin) / Math.max(0.5, (end - begin) / width));
  fill($("line"), [rounds, width, moved, Math.round(view.is_over ? 0 : Math.log(end - begin) * 300)], () => [drawLine(rounds, begin, end, step, width)]);
}

function tickStep(least) {
  const steps = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400];
  return steps.find((step) => step >= least) ?? Math.ceil(least / 86400) * 86400;
}

function drawLine(rounds, begin, end, step, width) {
  const left = 1;
  const right = width - 1;
  const x = (at) => left + ((right - left) * (at - begin)) / (end - begin);
  const top = 24;
  const height = 30;
  const words = rounds.map((round) => `round ${round.round}${round.end ? ` ended: ${round.reason || ENDS[round.end]?.[2]}` : " goes on"}`);
  const drawn = make("svg:svg", { viewBox: `0 0 ${width} ${top + height + 10}`, height: top + height + 10, role: "img", "aria-label": `Time line of ${count(rounds.length, "round")}: ${words.slice(-SHOWN_ROUNDS).join("; ")}` });
  for (let at = 0; at <= end - begin; at += step) {
    const place = x(begin + at);
    drawn.append(make("svg:line", { class: "tick", x1: place, x2: place, y1: top - 6, y2: top + height + 6 }));
    if (place < width - 50) drawn.append(make("svg:text", { class: "tick", x: place + 3, y: 12 }, at ? whole(at) : "start"));
  }
  rounds.forEach((round, place) => {
    const from = x(round.started_at);
    const until = x(round.ended_at ?? rounds[place + 1]?.started_at ?? end);
    const before = place ? x(rounds[place - 1].ended_at ?? round.started_at) : x(begin);
    const [tone, itsSign] = round.end ? ENDS[round.end] ?? ["off", "unknown"] : ["info", "running"];
    const wide = Math.max(3, until - from);
    drawn.append(make("svg:line", { class: "between", x1: before, x2: from, y1: top + height / 2, y2: top + height / 2 }));
    drawn.append(make("svg:rect", { class: `span ${tone}`, x: from, y: top, width: wide, height, rx: Math.min(4, wide / 2) }, make("svg:title", {}, words[place])));
    if (wide > 46) drawn.append(make("svg:text", { x: from + 8, y: top + 20 }, String(round.round)));
    if (wide > 22) drawn.append(make("svg:use", { class: tone, href: `#sign-${itsSign}`, x: from + wide - 18, y: top + 9, width: 12, height: 12 }));
  });
  return drawn;
}

// ---- Where the time went

function showTime(progress) {
  $("time").hidden = !progress?.elapsed;
  if (!progress?.elapsed) return;
  const parts = PARTS.map(([name, kind, read]) => [name, kind, read(progress) ?? 0]);
  const known = parts.reduce((sum, [, , seconds]) => sum + seconds, 0);
  parts.push(["other", "other", Math.max(0, progress.elapsed - known)]);
  const some = parts.filter(([, , seconds]) => seconds >= 0.05);
  fill($("time-bar"), some.map(([, kind]) => kind), () => some.map(([, kind]) => make("div", { class: `part-${kind}` })));
  some.forEach(([, , seconds], place) => { $("time-bar").children[place].style.flexGrow = String(seconds); });
  fill($("time-parts"), some.map(([, kind]) => kind), () => some.map(([name, kind]) =>
    make("li", {}, make("i", { class: `swatch part-${kind}`, "aria-hidden": "true" }), make("span", {}, name), make("b"))));
  some.forEach(([, , seconds], place) => setText($("time-parts").children[place].lastChild, `${duration(seconds)} (${percent(seconds / progress.elapsed)})`));
}

// ---- Stacks

async function takeStacks() {
  const job = shown.job;
  $("stacks-take").disabled = true;
  $("stacks").setAttribute("aria-busy", "true");
  setText($("stacks-note"), "Taking the stacks; nodes learn of it with their next heartbeats …");
  let note = "";
  let reply = null;
  try {
    reply = await (await ask("api/stacks", { job }, { method: "POST" })).json();
    if (!reply.ok) note = reply.error;
  } catch (error) {
    note = error.status ? error.message : "The server does not answer.";
  }
  $("stacks").removeAttribute("aria-busy");
  if (shown.job !== job) return;
  $("stacks-take").disabled = Boolean(shown.view?.is_over);
  if (reply?.ok) {
    shown.suspects = new Set(reply.ranks ?? []);
    note = `Taken at ${clock(now())}.` + (reply.ranks?.length ? ` The odd one out: rank ${reply.ranks.join(", ")}.` : "");
    $("stacks").hidden = false;
    setText($("stacks"), reply.text);
    showNodes();
  }
  setText($("stacks-note"), note);
}

// ---- Output

let files = []; // [round, rank, stream] of each file.

async function refreshFiles() {
  const job = shown.job;
  let why = "";
  try {
    const reply = await (await ask("api/files", { job })).json();
    if (shown.job !== job) return;
    files = reply.files;
    why = reply.why_none;
  } catch (error) {
    if (shown.job !== job) return;
    files = [];
    why = error.status ? error.message : "";
  }
  const options = (values) => values.map(([value, text]) => make("option", { value }, text));
  const numbers = (place) => [...new Set(files.map((file) => file[place]))].sort((one, other) => one - other);
  refill($("log-rank"), options(numbers(1).map((rank) => [rank, rank])));
  refill($("log-round"), options([["", "latest"], ...numbers(0).reverse().map((round) => [round, round])]));
  $("log-form").hidden = !files.length;
  if (!files.length) setText($("log-note"), why);
  else if (!shown.log) setText($("log-note"), "");
  showRank();
}

/** Give a select other options, and keep what is chosen. */
function refill(select, options) {
  const chosen = select.value;
  select.replaceChildren(...options);
  if (options.some((option) => option.value === chosen)) select.value = chosen;
}

function openLog(event) {
  event?.preventDefault();
  const round = $("log-round").value;
  shown.log = { rank: $("log-rank").value, stream: $("log-stream").value, ...(round === "" ? {} : { round }) };
  $("log").hidden = true;
  setText($("log-note"), "Nothing there yet.");
  follow();
}

const log = { line: null };

function receiveLog(data) {
  const box = $("log");
  if (data.is_new) {
    box.hidden = false;
    box.replaceChildren(document.createTextNode(""));
    setText($("log-note"), `${data.title}; what follows appears here`);
    log.line = null;
  }
  const isAtEnd = data.is_new || box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  // Without what colours a terminal; of a line that is written again and again, as progress bars do, the last state.
  const clean = data.text.replace(/\x1b\[[0-9;?]*[ -/]*[@-~]/g, "").replace(/\r\n/g, "\n");
  const node = box.firstChild;
  node.appendData(clean);
  if (clean.includes("\r")) node.data = node.data.replace(/[^\n\r]*\r(?!$)/g, "");
  if (node.length > MAX_LOG) node.deleteData(0, node.length - MAX_LOG);
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

// ---- Begin

$("nodes").addEventListener("click", (event) => {
  const tile = event.target.closest("button");
  if (tile) chooseRank(Number(tile.dataset.rank));
});
$("nodes").addEventListener("keydown", moveInGrid);
$("nodes").addEventListener("focusin", (event) => {
  for (const tile of $("nodes").querySelectorAll('button[tabindex="0"]')) tile.tabIndex = -1;
  event.target.tabIndex = 0;
});
$("more").addEventListener("click", () => { shown.limit += PAGE_OF_NODES; showNodes(); });
$("find").addEventListener("input", showNodes);
$("all-rounds").addEventListener("click", () => { shown.allRounds = true; showRounds(shown.view); tick(); });
$("stacks-take").addEventListener("click", takeStacks);
$("log-form").addEventListener("submit", openLog);
$("log-form").addEventListener("focusin", (event) => { if (event.target.id === "log-rank") refreshFiles(); });
$("log-wrap").addEventListener("change", () => $("log").classList.toggle("wrap", $("log-wrap").checked));
$("rank-log").addEventListener("click", () => {
  $("log-rank").value = String(shown.rank);
  $("log-round").value = "";
  openLog();
  $("log-title").scrollIntoView();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says what is shown
  $("main").focus();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  $("token").value = "";
  session?.setItem("token", token);
  route();
});
window.addEventListener("hashchange", route);
window.addEventListener("resize", () => { if (shown.view) showLine(shown.view); });
// A page that nobody sees does not have the agents asked.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) { if (!shown.view?.is_over) follow(); return; }
  if (!shown.view?.is_over) { stream?.abort(); stream = null; setLive(""); }
});
setInterval(() => { tick(); if (shown.view && !shown.view.is_over) showLine(shown.view); }, 1000);
route();
