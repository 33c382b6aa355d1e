// What users of openai-node do with a batch server: each story ends well or with the text of what went wrong.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import fs from "node:fs";
import http from "node:http";
import { createRequire } from "node:module";
import path from "node:path";

const [sdkFolder, baseURL, inputPath] = process.argv.slice(2);
const require = createRequire(path.join(sdkFolder, "flow.js"));
const { default: OpenAI, AzureOpenAI, toFile } = require("openai");
const { VERSION } = require("openai/version");

const apiKey = process.env.OPENAI_API_KEY;
const content = fs.readFileSync(inputPath);
const wanted = idsOf(content.toString());
const endpoint = "/v1/chat/completions";
const order = { endpoint, completion_window: "24h" };
const client = new OpenAI({ baseURL, apiKey });
const WALK_MAX = 1000;

function idsOf(jsonl) {
  return jsonl.split("\n").filter(Boolean).map((line) => JSON.parse(line).custom_id);
}

// A client that shows the status of each of its responses, and may lose one of them.
function watching(statuses, { lose = () => false, see = () => {}, ...options } = {}) {
  const watched = async (url, init) => {
    const answer = await fetch(url, init);
    statuses.push(answer.status);
    see();
    if (lose(statuses.length)) throw new TypeError("the cable was pulled");
    return answer;
  };
  return new OpenAI({ baseURL, apiKey, fetch: watched, ...options });
}

function upload(options = {}, from = client) {
  return from.files.create({ file: fs.createReadStream(inputPath), purpose: "batch" }, options);
}

// The end of a batch is the end of its events.
async function ended(batchId) {
  const headers = { Authorization: `Bearer ${apiKey}` };
  await (await fetch(`${baseURL}/batches/${batchId}/events`, { headers })).text();
  const batch = await client.batches.retrieve(batchId);
  assert(["completed", "failed", "expired", "cancelled"].includes(batch.status), batch.status);
  return batch;
}

async function finished() {
  const file = await upload();
  return ended((await client.batches.create({ ...order, input_file_id: file.id })).id);
}

async function walked(pages) {
  const ids = [];
  for await (const each of pages) {
    ids.push(each.id);
    assert(ids.length < WALK_MAX, "the walk does not end");
  }
  return ids;
}

const stories = {
  async whole_flow() {
    const file = await client.files.waitForProcessing((await upload()).id);
    assert.equal(file.status, "processed");
    assert.equal(file.bytes, content.length);
    assert.equal(file.filename, path.basename(inputPath));

    const made = await client.batches.create({ ...order, input_file_id: file.id, metadata: { team: "search" } });
    assert.equal(made.status, "validating");
    assert.deepEqual(made.metadata, { team: "search" });
    const batch = await ended(made.id);

    assert.equal(batch.status, "completed");
    assert.deepEqual(batch.request_counts, { total: wanted.length, completed: wanted.length - 1, failed: 1 });
    const output = await (await client.files.content(batch.output_file_id)).text();
    const errors = await (await client.files.content(batch.error_file_id)).text();
    assert.deepEqual([...idsOf(output), ...idsOf(errors)], wanted);
    assert.equal(JSON.parse(errors).response.status_code, 400);
    assert.equal((await client.files.delete(file.id)).deleted, true);
  },

  async pages_end() {
    const files = [];
    for (let each = 0; each < 5; each += 1) {
      files.push((await client.files.create({ file: await toFile(Buffer.from("x"), "x.txt"), purpose: "user_data" })).id);
    }
    assert.deepEqual(await walked(client.files.list({ purpose: "user_data", limit: 2, order: "asc" })), files);

    const batches = [];
    for (let each = 0; each < 3; each += 1) {
      batches.push((await client.batches.create({ ...order, input_file_id: "file-that-nobody-sent" })).id);
    }
    const found = await walked(client.batches.list({ limit: 2 }));
    assert.deepEqual(found.slice(0, 3), batches.reverse());
    assert.equal(new Set(found).size, found.length);
    for (const each of files) await client.files.delete(each);
  },

  async final_conflict_costs_one_request() {
    const batch = await finished();
    const statuses = [];
    await assert.rejects(watching(statuses).batches.cancel(batch.id), (error) => {
      assert(error instanceof OpenAI.ConflictError);
      assert.match(error.message, /Cannot cancel a batch with status 'completed'\./);
      return true;
    });
    assert.deepEqual(statuses, [409]);
  },

  async running_conflict_is_tried_again() {
    for (let round = 0; round < 20; round += 1) {
      const statuses = [];
      const key = `slow-${VERSION}-${round}`;
      const mayEnd = happening();
      const slow = slowUpload(key, mayEnd);
      await slow.halfSent;
      const watched = watching(statuses, { see: mayEnd.happened, maxRetries: 5 });
      const file = await watched.files.create(
        { file: await toFile(content, "same.jsonl"), purpose: "batch" },
        { headers: { "Idempotency-Key": key } },
      );
      const first = await slow.ended;
      // The slow one may have come too late to hold the key; it is refused then, or given the same file.
      if (first.status === 200) assert.equal(first.id, file.id);
      if (statuses.includes(409)) {
        assert.equal(statuses.at(-1), 200);
        assert.equal(first.status, 200);
        return;
      }
    }
    assert.fail("nobody was asked to come again");
  },

  async lost_answer_makes_one_batch() {
    const file = await upload();
    const statuses = [];
    const losing = watching(statuses, { lose: (count) => count === 1 });
    const headers = { "Idempotency-Key": `order-${VERSION}` };
    const made = await losing.batches.create({ ...order, input_file_id: file.id }, { headers });
    assert.deepEqual(statuses, [200, 200]);
    const { data } = await client.batches.list({ limit: 100 });
    assert.deepEqual(data.filter((each) => each.input_file_id === file.id).map((each) => each.id), [made.id]);
  },

  async downloads_stream() {
    const batch = await finished();
    const whole = Buffer.from(await (await client.files.content(batch.output_file_id)).arrayBuffer());
    const answer = await client.files.content(batch.output_file_id);
    assert.equal(answer.headers.get("content-length"), String(whole.length));
    const pieces = [];
    for await (const piece of answer.body) pieces.push(Buffer.from(piece));
    assert(Buffer.concat(pieces).equals(whole));
    const { data, response } = await client.batches.retrieve(batch.id).withResponse();
    assert.equal(data.id, batch.id);
    assert.equal(response.headers.get("x-request-id"), data._request_id);
  },

  async upload_comes_in_parts() {
    const half = Math.floor(content.length / 2);
    const made = await client.uploads.create({
      bytes: content.length,
      filename: "parts.jsonl",
      mime_type: "application/jsonl",
      purpose: "batch",
    });
    const halves = [content.subarray(half), content.subarray(0, half)];
    const parts = await Promise.all(
      halves.map(async (data) => client.uploads.parts.create(made.id, { data: await toFile(data, "part") })),
    );
    const partIds = [parts[1].id, parts[0].id];
    await assert.rejects(client.uploads.complete(made.id, { part_ids: partIds.slice(1) }), { param: "bytes" });
    const md5 = createHash("md5").update(content).digest("hex");
    const done = await client.uploads.complete(made.id, { part_ids: partIds, md5 });
    assert.equal(done.status, "completed");
    assert.equal(await (await client.files.content(done.file.id)).text(), content.toString());
  },

  async errors_have_their_classes() {
    const file = await upload();
    const stranger = new OpenAI({ baseURL, apiKey: "brk_of_nobody" });
    const create = { ...order, input_file_id: file.id };
    const cases = [
      [() => client.files.retrieve("file-1"), OpenAI.NotFoundError, 404, "id", null, /No such File object: file-1/],
      [() => client.files.content("file-1"), OpenAI.NotFoundError, 404, "id", null, /No such File object: file-1/],
      [() => client.batches.retrieve("batch_1"), OpenAI.NotFoundError, 404, null, null, /No batch found with id 'batch_1'/],
      [
        () => client.batches.create({ ...create, endpoint: "/v1/nothing" }),
        OpenAI.BadRequestError,
        400,
        "endpoint",
        "invalid_value",
        /Invalid value: '\/v1\/nothing'/,
      ],
      [
        () => client.files.create({ file: fs.createReadStream(inputPath), purpose: "nothing" }),
        OpenAI.BadRequestError,
        400,
        "purpose",
        null,
        /'nothing' is not one of/,
      ],
      [() => stranger.batches.list(), OpenAI.AuthenticationError, 401, null, "invalid_api_key", /Incorrect API key/],
    ];
    for (const [call, kind, status, param, code, words] of cases) {
      await assert.rejects(call(), (error) => {
        assert(error instanceof kind, String(error));
        assert.deepEqual([error.status, error.param, error.code], [status, param, code]);
        assert.equal(error.type, "invalid_request_error");
        assert.match(error.message, words);
        assert(error.requestID);
        return true;
      });
    }
  },

  async refused_input_is_a_failed_batch() {
    const first = content.toString().split("\n")[0];
    const twice = await toFile(Buffer.from(`${first}\n${first}\n{`), "twice.jsonl");
    const file = await client.files.create({ file: twice, purpose: "batch" });
    const batch = await ended((await client.batches.create({ ...order, input_file_id: file.id })).id);
    assert.equal(batch.status, "failed");
    assert.deepEqual(
      batch.errors.data.map((each) => [each.code, each.line]),
      [["duplicate_custom_id", 2], ["invalid_json_line", 3]],
    );
  },

  async azure_client() {
    const azure = new AzureOpenAI({
      baseURL: baseURL.replace(/\/v1$/, "/openai/v1"),
      apiKey,
      apiVersion: "2024-10-21",
    });
    const file = await upload({}, azure);
    const made = await azure.batches.create({ ...order, input_file_id: file.id });
    assert.equal((await azure.batches.retrieve(made.id)).id, made.id);
    assert.equal((await ended(made.id)).status, "completed");
  },

  async cancel_may_be_repeated() {
    const file = await upload();
    const made = await client.batches.create({ ...order, input_file_id: file.id });
    const first = await client.batches.cancel(made.id);
    const second = await client.batches.cancel(made.id);
    assert(["cancelling", "cancelled"].includes(first.status));
    assert(["cancelling", "cancelled"].includes(second.status));
    assert.equal((await ended(made.id)).status, "cancelled");
  },
};

// Something to wait for, and what says that it has happened.
function happening() {
  let happened;
  const waiting = new Promise((resolve) => { happened = resolve; });
  return Object.assign(waiting, { happened });
}

// Upload the input without any SDK, with a pause in the middle until it may end or is answered.
function slowUpload(key, mayEnd) {
  const boundary = "----flow";
  const field = `--${boundary}\r\nContent-Disposition: form-data; name=`;
  const head = `${field}"purpose"\r\n\r\nbatch\r\n${field}"file"; filename="same.jsonl"\r\n\r\n`;
  const request = http.request(`${baseURL}/files`, {
    method: "POST",
    headers: {
      Authorization: `Bearer ${apiKey}`,
      "Content-Type": `multipart/form-data; boundary=${boundary}`,
      "Idempotency-Key": key,
    },
  });
  const ended = new Promise((resolve, reject) => {
    request.on("error", reject);
    request.on("response", async (answer) => {
      mayEnd.happened();
      const pieces = [];
      for await (const piece of answer) pieces.push(piece);
      resolve({ status: answer.statusCode, id: JSON.parse(Buffer.concat(pieces).toString()).id });
    });
  });
  const halfSent = new Promise((resolve) => {
    request.write(Buffer.concat([Buffer.from(head), content.subarray(0, content.length / 2)]), resolve);
  });
  (async () => {
    await halfSent;
    await mayEnd;
    request.end(Buffer.concat([content.subarray(content.length / 2), Buffer.from(`\r\n--${boundary}--\r\n`)]));
  })();
  return { halfSent, ended };
}

const ends = {};
for (const [name, told] of Object.entries(stories)) {
  try {
    await told();
    ends[name] = "";
  } catch (error) {
    ends[name] = error.stack;
  }
}
console.log(JSON.stringify({ version: VERSION, ends }));
