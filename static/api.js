// Talking to the server: JSON, events as they happen, images; with a key where one is needed.

const KEY = "diffusion-sharpening.key";

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => sessionStorage.setItem(KEY, value);

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

/** Posts JSON and yields the events of the answer: {name, data}. */
export async function* events(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
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
      if (data !== undefined) yield { name: field("event: "), data: JSON.parse(data) };
    }
  }
}

/** Generates, and tells of each event before the end; the answer. */
export async function generate(body, signal, tell) {
  for await (const { name, data } of events("/generate", body, signal)) {
    if (name === "completed") return data;
    if (name === "failed" || name === "cancelled") throw data;
    tell(name, data);
  }
  throw { title: "The server ended the stream", detail: "Is it still running?", status: 0 };
}

/** An address that an img can have: images need the key, too. */
export async function imageSource(url) {
  if (!key()) return url;
  const response = await request(url);
  if (!response.ok) throw await refusal(response);
  return URL.createObjectURL(await response.blob());
}
