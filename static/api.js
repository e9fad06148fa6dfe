// Talking to the server: JSON, events as they happen, images; with a key where one is needed.

const KEY = "diffusion-sharpening.key";

/** A request with anything else in its header could not be sent at all. */
const sendable = (text) => text.replace(/[^\x21-\x7e]/g, "");

/** Kept here, too: not every browser stores. */
let kept = null;

export function key() {
  if (kept !== null) return kept;
  try {
    kept = sendable(sessionStorage.getItem(KEY) ?? "");
  } catch {
    kept = "";
  }
  return kept;
}

export function setKey(value) {
  kept = sendable(value);
  try {
    sessionStorage.setItem(KEY, kept);
  } catch {
    // A browser that stores nothing asks again after a reload.
  }
}

async function request(path, init = {}) {
  const headers = { ...init.headers };
  if (key()) headers["X-API-Key"] = key();
  try {
    return await fetch(path, { ...init, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw { title: "The server did not answer", detail: "Is it still running?", status: 0 };
  }
}

/** What a refusal says, as a problem. */
async function refusal(response) {
  const body = await response.json().catch(() => null);
  const problem = {
    title: body?.title ?? `The server answered ${response.status}`,
    detail: body?.detail ?? response.statusText,
    field: body?.field,
    status: response.status,
  };
  const retry = Number(response.headers.get("retry-after"));
  if (retry > 0 && !problem.detail.includes("try again")) {
    problem.detail += ` (try again in ${retry} s)`;
  }
  return problem;
}

/** Fetches JSON; anything but success is thrown as a problem. */
export async function call(path, init) {
  const response = await request(path, init);
  if (!response.ok) throw await refusal(response);
  return response.status === 204 ? null : response.json();
}

/** Posts JSON; what comes back. */
export function post(path, body, headers = {}) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(body),
  });
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Reads the events of one stream: {id, name, data}. */
async function* read(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").find((line) => line.startsWith(name))?.slice(name.length);
      const data = field("data: ");
      if (data !== undefined) yield { id: field("id: "), name: field("event: "), data: JSON.parse(data) };
    }
  }
}

const ENDS = new Set(["completed", "failed", "cancelled"]);

/**
 * Follows a generation to its end and tells of each event; comes back where the connection
 * breaks. Resolves when it has ended or the server has nothing more to tell.
 */
export async function follow(id, signal, tell) {
  let last = null;
  for (let failures = 0; failures < 20; ) {
    try {
      const headers = { Accept: "text/event-stream" };
      if (last !== null) headers["Last-Event-ID"] = last;
      const response = await request(`/generations/${id}/events`, { headers, signal });
      if (response.status === 204) return;
      if (!response.ok) throw await refusal(response);
      for await (const event of read(response)) {
        failures = 0;
        last = event.id ?? last;
        tell(event.name, event.data);
        if (ENDS.has(event.name)) return;
      }
    } catch (problem) {
      if (signal.aborted || (problem.status >= 400 && problem.status !== 503)) throw problem;
    }
    failures += 1;
    await pause(250 * failures);
  }
  throw { title: "The server ended the stream", detail: "Is it still running?", status: 0 };
}

/** An address that an img can have: images need the key, too. Who gets a blob revokes it. */
export async function imageSource(url) {
  if (!key()) return url;
  const response = await request(url);
  if (!response.ok) throw await refusal(response);
  return URL.createObjectURL(await response.blob());
}

/** The address of a PNG in base64. */
export function pngSource(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}
