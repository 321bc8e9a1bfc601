"use strict";
// Asks /v1/overview every second and writes what comes into the tables. Everything is put in as text.

const KEY = "lenskit-api-key"; // kept for this tab only
const SECONDS = 1;
let now = 0;

function cell(content, name) {
  const td = document.createElement("td");
  if (content instanceof Node) td.append(content);
  else td.textContent = content ?? "";
  if (name) td.className = name;
  return td;
}

function fill(id, rows, nothing) {
  const body = document.querySelector(`#${id} tbody`);
  const columns = document.querySelectorAll(`#${id} th`).length;
  const made = rows.map((cells) => {
    const tr = document.createElement("tr");
    tr.append(...cells);
    return tr;
  });
  if (!made.length) {
    const tr = document.createElement("tr");
    const td = cell(nothing, "empty");
    td.colSpan = columns;
    tr.append(td);
    made.push(tr);
  }
  body.replaceChildren(...made);
}

function ago(time) {
  if (time === null || time === undefined) return "";
  const seconds = Math.max(0, now - time);
  if (seconds < 60) return `${seconds.toFixed(0)} s ago`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(0)} min ago`;
  return `${(seconds / 3600).toFixed(1)} h ago`;
}

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return `${n < 10 && unit !== "B" ? n.toFixed(1) : Math.round(n)} ${unit}`;
    n /= 1024;
  }
}

function steps(step, all) {
  const span = document.createElement("span");
  if (all > 1) {
    const bar = document.createElement("progress");
    bar.max = all;
    bar.value = step ?? 0;
    span.append(bar, " ");
  }
  span.append(`${step ?? 0} of ${all}`);
  return span;
}

function memory(devices) {
  return devices.map((d) => `${d.device}: ${bytes(d.used)} of ${bytes(d.total)}`).join(", ") || "–";
}

function outcome(job) {
  if (job.error) {
    const span = document.createElement("span");
    const more = document.createElement("small");
    span.append(job.error.type);
    more.textContent = `${job.error.what}: ${job.error.got}`;
    span.append(more);
    return span;
  }
  if (job.status === "queued") return job.place === 0 ? "next" : `${job.place} before it`;
  return job.result ? bytes(job.result.bytes) : "";
}

function show(found) {
  now = found.time;
  fill("models", found.models.map((m) => [
    cell(m.name), cell(m.family), cell(m.n_layers), cell(m.d_model), cell(m.dtype), cell(m.status, m.status),
    cell(m.restarts ? `${m.replicas}, restarted ${m.restarts} times` : m.replicas), cell(m.queued), cell(m.running),
    cell(memory(m.memory)),
  ]), "none");
  fill("running", found.running.map((r) => [cell(r.model), cell(r.rows), cell(steps(r.step, r.steps)), cell(ago(r.started))]),
    "nothing");
  fill("jobs", found.jobs.map((j) => [
    cell(j.id), cell(j.model), cell(`${j.verb}, ${j.rows} ${j.rows === 1 ? "row" : "rows"}`), cell(j.status, j.status),
    cell(j.status === "queued" ? "" : steps(j.step, j.steps)), cell(ago(j.created)),
    cell(j.finished && j.started ? `${(j.finished - j.started).toFixed(2)} s` : ""), cell(outcome(j), "wrap"),
  ]), "none yet");
  fill("failures", found.failures.map((f) => [cell(f.model), cell(f.type, "failed"), cell(ago(f.finished))]), "none");
}

function say(text, bad) {
  const state = document.querySelector("#state");
  state.textContent = text;
  state.className = bad ? "bad" : "";
}

async function look() {
  const key = sessionStorage.getItem(KEY);
  try {
    const answer = await fetch("/v1/overview", { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store" });
    const found = await answer.json();
    document.querySelector("main").hidden = !answer.ok;
    if (answer.ok) {
      show(found);
      const busy = found.models.reduce((n, m) => n + m.queued + m.running, 0);
      say(busy ? `${busy} ${busy === 1 ? "job" : "jobs"} in the house` : "idle");
      document.querySelector("#key-form").hidden = !key; // no key was needed
    } else {
      document.querySelector("#key-form").hidden = false;
      say(answer.status === 401 ? (key ? "the server does not know this key" : "enter your API key") : found.error.what, Boolean(key));
    }
  } catch (error) {
    say("the server does not answer", true);
  }
  setTimeout(look, SECONDS * 1000);
}

document.querySelector("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, document.querySelector("#key").value.trim());
  say("asking …");
});
look();
