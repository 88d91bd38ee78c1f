// The public API, with the key kept for this tab only.

const KEY = "tenfold.key";

export const signedIn = () => sessionStorage.getItem(KEY) !== null;
export const signIn = (key) => sessionStorage.setItem(KEY, key.trim());
export const signOut = () => sessionStorage.removeItem(KEY);

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `The service answered ${status}.`);
    this.status = status;
    this.code = body.code;
  }
}

const headers = () => ({ Authorization: `Bearer ${sessionStorage.getItem(KEY)}` });

async function checked(reply) {
  if (reply.ok || reply.status === 304) return reply;
  throw new Problem(reply.status, await reply.json().catch(() => ({})));
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body) {
  const reply = await fetch(path, {
    method: "POST",
    headers: { ...headers(), "Content-Type": "application/json", "Idempotency-Key": crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  return (await checked(reply)).json();
}

/** The pages of a listing, the first one after `cursor`. */
export async function* pages(path, cursor = null) {
  do {
    const page = await get(`${path}?${new URLSearchParams({ limit: "500", ...(cursor ? { cursor } : {}) })}`);
    yield page;
    cursor = page.next;
  } while (cursor);
}

/** Every item of a paged listing. */
export async function all(path) {
  const items = [];
  for await (const page of pages(path)) items.push(...page.items);
  return items;
}

export const sleep = (seconds) => new Promise((r) => setTimeout(r, 1000 * seconds));

/** Calls show(json) now and after every change, by long polling with ETags, until `signal` aborts. */
export async function follow(path, show, signal) {
  let etag = null;
  while (!signal.aborted) {
    try {
      const began = Date.now();
      const reply = await checked(await fetch(etag ? `${path}?wait=20` : path, {
        headers: { ...headers(), ...(etag ? { "If-None-Match": etag } : {}) }, signal, cache: "no-store",
      }));
      if (reply.status !== 304) {
        etag = reply.headers.get("ETag");
        await show(await reply.json());
      }
      // However fast changes come, a picture a second is enough.
      await sleep((document.hidden ? 5 : 1) - (Date.now() - began) / 1000);
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && [401, 403, 404].includes(error.status)) throw error;
      await sleep(3);
    }
  }
}

/** Calls show(json) now and whenever the reply differs, looking every few seconds (what show returns), until `signal` aborts. */
export async function poll(path, show, signal) {
  let etag = null;
  let pause = 3;
  while (!signal.aborted) {
    try {
      const reply = await checked(await fetch(path, { headers: { ...headers(), ...(etag ? { "If-None-Match": etag } : {}) }, signal, cache: "no-store" }));
      if (reply.status !== 304) {
        etag = reply.headers.get("ETag");
        pause = show(await reply.json());
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status < 500 && error.status !== 429) throw error;
    }
    await sleep(pause);
  }
}

/** Stream a file up; XMLHttpRequest because fetch tells nothing of upload progress. */
export function upload(file, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `/v1/uploads?filename=${encodeURIComponent(file.name)}`);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (e) => e.lengthComputable && progress(e.loaded / e.total);
    request.onerror = () => reject(new Error("The connection was lost while uploading. Try again."));
    request.onload = () => {
      let body = {};
      try { body = JSON.parse(request.responseText); } catch { /* a proxy's page */ }
      if (request.status < 300) resolve(body); else reject(new Problem(request.status, body));
    };
    request.send(file);
  });
}

export async function download(artifact) {
  const reply = await checked(await fetch(`/v1/artifacts/${artifact.id}/content`, { headers: headers() }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await reply.blob());
  link.download = artifact.filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
