"""The page's way in where a token is set: the token once, a cookie from then on."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from searchengine.web.answers import problems
from searchengine.web.bodies import form_of
from searchengine.web.security import Access
from searchengine.web.uploads import media_type_of

router = APIRouter(tags=["access"])

FORM = "application/x-www-form-urlencoded"
LED_ON: dict[str, Any] = {"status_code": 303, "response_class": RedirectResponse}


class LoginForm(BaseModel):
    token: str = Field(min_length=1, max_length=4096)


BODY = {"requestBody": {"required": True, "content": {FORM: {"schema": LoginForm.model_json_schema()}}}}


def access_of(request: Request) -> Access:
    access: Access = request.app.state.access
    return access


@router.post("/login", **LED_ON, responses=problems(400, 401, 404, 408, 413, 415, 422, 429), openapi_extra=BODY)
async def login(request: Request, access: Annotated[Access, Depends(access_of)]) -> RedirectResponse:
    """Exchange the token for a cookie, and go on to the page. 404: the service has no token, and wants none."""
    # By hand, for anybody may send this: no files, and little text.
    if media_type_of(request.headers) != FORM:
        raise HTTPException(415, f"the token comes as a form; send it as {FORM}")
    fields = await request.form(max_files=0, max_fields=8, max_part_size=8192)
    form = form_of({name: [str(value) for value in fields.getlist(name)] for name in fields}, LoginForm)
    if access.token is None:
        raise HTTPException(404, "the service has no token; nobody need log in")
    if not access.is_token(form.token):
        raise HTTPException(401, "this is not the service's token; it was given to `searchengine serve --token`")
    cookie = access.cookie(is_secure=request.url.scheme == "https")
    return RedirectResponse("/", status_code=303, headers={"set-cookie": cookie})


@router.post("/logout", **LED_ON)
async def logout(access: Annotated[Access, Depends(access_of)]) -> RedirectResponse:
    """Give the cookie back."""
    return RedirectResponse("/", status_code=303, headers={"set-cookie": access.no_cookie()})
