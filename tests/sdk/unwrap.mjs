// Verifies events off the wire with openai-node: each with each of its secrets, and none that was tampered with.
import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [sdkFolder, gotPath] = process.argv.slice(2);
const require = createRequire(path.join(sdkFolder, "unwrap.js"));
const { default: OpenAI, InvalidWebhookSignatureError } = require("openai");
const { VERSION } = require("openai/version");

const client = new OpenAI({ apiKey: "none" });
const verified = [];
let refused = 0;

for (const { headers, body, secrets, strangers } of JSON.parse(fs.readFileSync(gotPath, "utf8"))) {
  for (const secret of secrets) {
    const event = await client.webhooks.unwrap(body, headers, secret);
    assert.equal(event.object, "event");
    verified.push([event.type, event.id, event.data.id]);
  }
  const later = String(Number(headers["webhook-timestamp"]) + 1);
  const tampered = [
    [body.replace("batch_test", "batch_tesu"), headers, secrets[0]],
    [body, { ...headers, "webhook-id": "wh_other" }, secrets[0]],
    [body, { ...headers, "webhook-timestamp": later }, secrets[0]],
    [body, { ...headers, "webhook-signature": "v1,AAAA" }, secrets[0]],
    ...strangers.map((secret) => [body, headers, secret]),
  ];
  for (const each of tampered) {
    await assert.rejects(client.webhooks.unwrap(...each), InvalidWebhookSignatureError);
    refused += 1;
  }
}

console.log(JSON.stringify({ version: VERSION, verified, refused }));
